"""How many samples were skipped because they are too long for the context."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from hybridvl.data.module import ChatDataModule
from hybridvl.training.processes.sums import summed_counts
from hybridvl.training.trainer import logs_now


class SkippedSamples(Callback):
    """Logs data/skipped, the training samples that all processes have skipped so far (`data.too_long: skip`).

    Attributes:
        counts: samples by split at the end of what ran: of training in all, else of one pass.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log when the trainer logs."""
        data = _skipping(trainer)
        if data is None or not logs_now(trainer):
            return
        counts = summed_counts(data.skipped())
        for logger in trainer.loggers:
            logger.log_metrics({"data/skipped": counts.get("train", 0)}, step=trainer.global_step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count."""
        self._count(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count."""
        self._count(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count."""
        self._count(trainer)

    def _count(self, trainer: Trainer) -> None:
        data = _skipping(trainer)
        if data is not None:
            self.counts |= summed_counts(data.skipped())


def _skipping(trainer: Trainer) -> ChatDataModule | None:
    """The data module, if it may skip samples."""
    data = getattr(trainer, "datamodule", None)
    return data if isinstance(data, ChatDataModule) and data.too_long == "skip" else None
