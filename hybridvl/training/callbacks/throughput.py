"""Tokens and samples per second of training over all processes, validation and saving left out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from hybridvl.training.answers import real_tokens, sample_count
from hybridvl.training.processes.sums import gathered
from hybridvl.training.trainer import logs_now


class Throughput(Callback):
    """Logs speed/tokens_per_s, speed/samples_per_s and speed/step_s, averaged since the previous log.

    Padding is not counted. The totals (`tokens`, `samples`, `seconds`) go on after a resume; tokens and samples are
    those of all processes, as of the previous log or checkpoint.

    Args:
        clock: seconds from any origin, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.tokens = 0
        self.samples = 0
        self.seconds = 0.0
        self._uncounted = (0, 0)  # tokens and samples of this process that are not in the totals yet
        self._logged = (0, 0, 0.0, 0)  # tokens, samples, seconds, steps at the previous log
        self._since: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._since = self._clock()
        self._logged = (self.tokens, self.samples, self.seconds, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Mapping[str, Any], batch_idx: int
    ) -> None:
        """Count the batch; log when the trainer logs."""
        now = self._clock()
        self.seconds += 0.0 if self._since is None else now - self._since
        self._since = now
        tokens, samples = self._uncounted
        self._uncounted = (tokens + real_tokens(batch), samples + sample_count(batch))
        if trainer.global_step == self._logged[3] or not logs_now(trainer):
            return
        self._count()
        tokens, samples, seconds, steps = self._logged
        elapsed = self.seconds - seconds
        if elapsed > 0:
            rates = {
                "speed/tokens_per_s": (self.tokens - tokens) / elapsed,
                "speed/samples_per_s": (self.samples - samples) / elapsed,
                "speed/step_s": elapsed / (trainer.global_step - steps),
            }
            for logger in trainer.loggers:
                logger.log_metrics(rates, step=trainer.global_step)
        self._logged = (self.tokens, self.samples, self.seconds, trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock while validating."""
        if self._since is not None:
            self.seconds += self._clock() - self._since
            self._since = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start it again when training goes on."""
        if trainer.training or trainer.state.fn == "fit":
            self._since = self._clock()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._count()
        self._since = None

    def state_dict(self) -> dict[str, Any]:
        """The totals; all processes must call this, as they do when a checkpoint is saved."""
        self._count()
        return {"tokens": self.tokens, "samples": self.samples, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the totals back."""
        self.tokens, self.samples = state_dict["tokens"], state_dict["samples"]
        self.seconds = state_dict["seconds"]

    def _count(self) -> None:
        """Add what all processes have done since the last call to the totals."""
        for tokens, samples in gathered(self._uncounted):
            self.tokens += tokens
            self.samples += samples
        self._uncounted = (0, 0)
