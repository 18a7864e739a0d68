"""Two checkpoint files of a run: the last one, to go on from, and the best one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from hybridvl.layers.errors import ConfigError
from hybridvl.training.trainer import is_dry_run, run_folder, validates_by_clock

LAST, BEST = "last.ckpt", "best.ckpt"


class Checkpoints(Checkpoint):
    """Keeps checkpoints/last.ckpt, and with `monitor` checkpoints/best.ckpt, in the run folder.

    Each file is replaced as a whole (see `AtomicCheckpointIO`), so there is always a good one. With `monitor` the fit
    ends with the best weights in the module.

    Args:
        every_n_steps: optimizer steps between two savings of last.ckpt; it is saved at the end in any case.
        monitor: a validation metric, for example val/exact; null keeps only the last checkpoint.
        mode: whether the metric should be large (max) or small (min).
    """

    def __init__(
        self, every_n_steps: int = 200, monitor: str | None = None, mode: Literal["min", "max"] = "max"
    ) -> None:
        if every_n_steps < 1:
            raise ConfigError(f"checkpoints.every_n_steps: {every_n_steps!r} is not a positive number of steps")
        self.every_n_steps = every_n_steps
        self.monitor = monitor
        self.mode = mode
        self.best: float | None = None
        self._saved_step = -1
        self._took_best = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the best score of another run that is gone on with here: its weights lie there."""
        if not (checkpoint_folder(trainer) / BEST).exists():
            self.best = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save last.ckpt when it is time; with a validation coming, after that, so that a resume does not miss it."""
        if self._is_time(trainer) and not _validates_now(trainer):
            self._save_last(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save best.ckpt when the metric is better than ever, and last.ckpt when it is time."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.monitor is not None:
            self._save_best(trainer, self.monitor)
        if self._is_time(trainer):
            self._save_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save last.ckpt, then take the best weights."""
        self._save_last(trainer)
        self.take_best(trainer)

    def take_best(self, trainer: Trainer) -> None:
        """Load the best weights, once; all processes must call this."""
        path = checkpoint_folder(trainer) / BEST
        if self.best is not None and not self._took_best and path.exists():
            self._took_best = True
            best = trainer.strategy.load_checkpoint(path, weights_only=True)
            trainer.strategy.load_model_state_dict(best)

    def state_dict(self) -> dict[str, Any]:
        """The best score so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        self.best = state_dict["best"]

    def _save_best(self, trainer: Trainer, monitor: str) -> None:
        if monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(trainer.callback_metrics))
            raise ConfigError(f"checkpoints.monitor: no metric is called {monitor!r} (known: {known})")
        score = float(trainer.callback_metrics[monitor])
        if is_better(score, self.best, self.mode) and not is_dry_run(trainer):
            self.best = score
            trainer.save_checkpoint(checkpoint_folder(trainer) / BEST, weights_only=False)

    def _is_time(self, trainer: Trainer) -> bool:
        # Not between two batches of one step: a checkpoint has no gradients.
        return trainer.global_step % self.every_n_steps == 0 and not trainer.fit_loop.epoch_loop._should_accumulate()

    def _save_last(self, trainer: Trainer) -> None:
        if trainer.global_step != self._saved_step and not is_dry_run(trainer):
            self._saved_step = trainer.global_step
            trainer.save_checkpoint(checkpoint_folder(trainer) / LAST, weights_only=False)


def is_better(score: float, best: float | None, mode: Literal["min", "max"]) -> bool:
    """Whether a score is a number, and better than the best one so far, if there is any."""
    if best is None or not math.isfinite(score):
        return math.isfinite(score)
    return score > best if mode == "max" else score < best


def _validates_now(trainer: Trainer) -> bool:
    """Whether a validation follows this training batch: what Lightning itself asks in a moment.

    Of validations by the clock nobody knows: it may strike while a checkpoint is saved, and starts anew at a resume.
    """
    if validates_by_clock(trainer):
        return False
    fit, batches = trainer.fit_loop, trainer.num_val_batches
    assert fit._data_fetcher is not None
    # No batches at all are known before the first validation.
    return bool(fit.epoch_loop._should_check_val_fx(fit._data_fetcher)) and (not batches or sum(batches) > 0)


def checkpoint_folder(trainer: Trainer) -> Path:
    """Where a run keeps its checkpoints."""
    return run_folder(trainer) / "checkpoints"
