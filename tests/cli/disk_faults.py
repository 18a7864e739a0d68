"""Callbacks that stand for a full disk, a killed process, a broken batch, a lack of memory; one that keeps a file."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from hybridvl.training.callbacks.checkpoints import checkpoint_folder


class FullDisk(Callback):
    """After step 5 no file can grow beyond 100 kB."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


class KilledWhileSaving(Callback):
    """SIGKILL in the middle of writing a checkpoint, after step 5: its bytes are there, its name is not."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 5:
            os.fsync = _kill_in_checkpoint


def _kill_in_checkpoint(handle: Any) -> None:
    number = handle if isinstance(handle, int) else handle.fileno()
    if ".ckpt" in os.readlink(f"/proc/self/fd/{number}"):
        os.kill(os.getpid(), signal.SIGKILL)


class Killed(Callback):
    """SIGKILL for the first process after step 5."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 5 and trainer.is_global_zero:
            os.kill(os.getpid(), signal.SIGKILL)


class KilledIn(Callback):
    """SIGKILL when the hook of this name is called after so many steps."""

    def __init__(self, hook: str, step: int) -> None:
        self._step = step
        setattr(self, hook, self._kill)

    def _kill(self, trainer: Any, *others: Any) -> None:
        if trainer.global_step == self._step and not trainer.sanity_checking:
            os.kill(os.getpid(), signal.SIGKILL)


class Poisoned(Callback):
    """From step 6 on, all that the last process sees in its first image is NaN."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step >= 5 and trainer.global_rank == trainer.world_size - 1:
            batch["pixel_values"][0] = float("nan")


class LittleMemory(Callback):
    """After step 2 the last process gets no more than 32 MiB beyond what it has then.

    That is enough for small things, as some libraries crash without them. MALLOC_MMAP_THRESHOLD_ must be small in its
    environment: malloc then keeps no tensor's memory for the next one."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2 and trainer.global_rank == trainer.world_size - 1:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + 2**25
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


class Kept(Callback):
    """The checkpoint of step 4 stays as checkpoints/kept.ckpt."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 4 and trainer.is_global_zero:
            folder = checkpoint_folder(trainer)
            shutil.copy(folder / "last.ckpt", folder / "kept.ckpt")


class Ended(Callback):
    """What HYBRIDVL_TEST_FAULT says after step 5: "stage SIGKILL" for the first process of the fit, "pipeline SIGTERM"
    for the one that started it; nothing without it, so that a run can be resumed with the same recipe."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        fault = os.environ.get("HYBRIDVL_TEST_FAULT")
        if fault is None or trainer.global_step != 5 or not trainer.is_global_zero:
            return
        whom, name = fault.split()
        os.kill(os.getpid() if whom == "stage" else os.getppid(), signal.Signals[name])
        for _ in range(3000):  # until the signal comes back
            if trainer.received_sigterm:
                return
            time.sleep(0.01)
        raise AssertionError("no signal came back")
