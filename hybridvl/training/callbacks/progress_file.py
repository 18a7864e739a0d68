"""How far a fit is, in a file that other processes watch."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from hybridvl.checkpoints.files import write_json
from hybridvl.layers.errors import ConfigError
from hybridvl.training.callbacks.throughput import Throughput
from hybridvl.training.trainer import callback_of, is_dry_run, run_folder

NAME = "progress.json"
VALIDATIONS = "validations.jsonl"


class ProgressFile(Callback):
    """Writes progress.json in the run folder: a new one at most once a second, and at the end of every part of the fit.

    Every validation of the fit adds a line to validations.jsonl: step, steps, and metrics, those of the validation.
    Neither file is needed to train: a fit goes on where they cannot be written.

    Keys of progress.json: doing ("train", "validate" or "test"), step, steps (null without an end), seconds and tokens
    of training so far, metrics (the latest value of each).

    Args:
        clock: seconds from any origin, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._written = float("-inf")
        self._metrics: dict[str, float] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write, unless it has just been done."""
        if self._clock() - self._written >= 1:
            self._write(trainer, "train")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write."""
        self._write(trainer, "validate")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write, and add a line about the validation."""
        self._write(trainer, "train")
        counts = trainer.state.fn == "fit" and not trainer.sanity_checking
        if trainer.is_global_zero and counts and not is_dry_run(trainer):
            found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
            line = json.dumps({"step": trainer.global_step, "steps": _steps(trainer), "metrics": found})
            with contextlib.suppress(OSError):
                _add_line(run_folder(trainer) / VALIDATIONS, line)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write."""
        self._write(trainer, "test")

    def _write(self, trainer: Trainer, doing: str) -> None:
        if not trainer.is_global_zero or is_dry_run(trainer) or trainer.state.fn in ("validate", "predict"):
            return
        self._written = self._clock()
        self._metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}
        speed = callback_of(trainer, Throughput)
        facts: dict[str, Any] = {
            "doing": doing,
            "step": trainer.global_step,
            "steps": _steps(trainer),
            "seconds": 0.0 if speed is None else round(speed.seconds, 3),
            "tokens": 0 if speed is None else speed.tokens,
            "metrics": self._metrics,
        }
        with contextlib.suppress(ConfigError):
            write_json(run_folder(trainer) / NAME, facts, durable=False)


def _add_line(path: Path, line: str) -> None:
    """Add a line to a file, after the end of half a line that a killed process may have left."""
    with path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        file.write((b"" if file.read() in (b"", b"\n") else b"\n") + line.encode() + b"\n")


def _steps(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole fit; None without an end."""
    total = trainer.estimated_stepping_batches if trainer.state.fn == "fit" else trainer.global_step
    # Lightning says -1 where epochs have no end.
    return None if total == float("inf") or total < 0 else int(total)
