"""Questions to Lightning's trainer whose answers it sets without declaring them."""

from __future__ import annotations

from lightning.pytorch import Trainer


def is_dry_run(trainer: Trainer) -> bool:
    """Whether the trainer only tries a few batches (`--trainer.fast_dev_run`) and nothing is to be written."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def logs_now(trainer: Trainer) -> bool:
    """Whether the optimizer step just done is one after which the trainer logs."""
    return trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]


def logs_next(trainer: Trainer) -> bool:
    """Whether the optimizer step about to be done is one after which the trainer logs."""
    return (trainer.global_step + 1) % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
