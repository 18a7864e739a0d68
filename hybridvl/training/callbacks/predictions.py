"""Replies of `predict` as lines of JSON in the run folder."""

from __future__ import annotations

import json
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from hybridvl.training.processes.sums import gathered
from hybridvl.training.trainer import run_folder


class PredictionWriter(Callback):
    """Writes predictions.jsonl: one object a question, as `TrainingModule.predict_step` returns it.

    With several processes, the questions of the first come first, then those of the second, and so on.
    """

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
        lines = [line for own in gathered(self._lines) for line in own]
        if not trainer.is_global_zero:
            return
        path = run_folder(trainer) / "predictions.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        print(f"predictions  {path}")
