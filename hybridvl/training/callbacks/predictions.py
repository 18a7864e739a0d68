"""Replies of `predict` as lines of JSON in the run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class PredictionWriter(Callback):
    """Writes predictions.jsonl: one object a question, as `SupervisedTuning.predict_step` returns it."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._lines = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: list[dict[str, Any]],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect the batch."""
        self._lines += [json.dumps(reply, ensure_ascii=False) for reply in outputs]

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        if not trainer.is_global_zero:
            return
        path = Path(trainer.log_dir or trainer.default_root_dir) / "predictions.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in self._lines), encoding="utf-8")
        print(f"predictions  {path}")
