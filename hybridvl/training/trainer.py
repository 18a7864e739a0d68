"""Questions to Lightning's trainer whose answers it sets without declaring them."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

Kind = TypeVar("Kind", bound=Callback)


def is_dry_run(trainer: Trainer) -> bool:
    """Whether the trainer only tries a few batches (`--trainer.fast_dev_run`) and nothing is to be written."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def run_folder(trainer: Trainer) -> Path:
    """The folder of the run, as this process knows it.

    Unlike `Trainer.log_dir` it asks no other process, so that one process alone may call it.
    """
    if not trainer.loggers:
        return Path(trainer.default_root_dir)
    logger = trainer.loggers[0]
    folder = logger.log_dir if isinstance(logger, CSVLogger | TensorBoardLogger) else logger.save_dir
    return Path(folder or trainer.default_root_dir)


def logs_now(trainer: Trainer) -> bool:
    """Whether the optimizer step just done is one after which the trainer logs."""
    return trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]


def logs_next(trainer: Trainer) -> bool:
    """Whether the optimizer step about to be done is one after which the trainer logs."""
    return (trainer.global_step + 1) % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]


def callback_of(trainer: Trainer, kind: type[Kind]) -> Kind | None:
    """The trainer's callback of a kind; None where it has none."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)


def validates_by_clock(trainer: Trainer) -> bool:
    """Whether `trainer.val_check_interval` is a time."""
    return trainer._val_check_time_interval is not None  # type: ignore[attr-defined]
