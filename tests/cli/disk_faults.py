"""Callbacks that stand for a full disk and for a killed process."""

from __future__ import annotations

import os
import resource
import signal
from typing import Any

from lightning.pytorch import Callback


class FullDisk(Callback):
    """After step 5 no file can grow beyond 100 kB."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


class KilledWhileSaving(Callback):
    """SIGKILL in the middle of writing a checkpoint, after step 5: its bytes are there, its name is not."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 5:
            os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)


class Killed(Callback):
    """SIGKILL for the first process after step 5."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 5 and trainer.is_global_zero:
            os.kill(os.getpid(), signal.SIGKILL)
