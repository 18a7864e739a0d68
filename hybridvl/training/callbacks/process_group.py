"""The processes of a run on one machine end together: one message, one exit status, nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import distributed

from hybridvl.data.loader import end_with_parent
from hybridvl.layers.errors import ConfigError, RunError
from hybridvl.training.memory import is_out_of_memory

GRACE = 5.0
"""Seconds that a process waits for the others to say what is wrong."""

MISTAKE, FAILED = 2, 3
"""Exit statuses of a process that was asked for something that cannot be done, and of one whose run cannot go on."""


FIRST = "HYBRIDVL_FIRST_PROCESS"
"""Environment variable in which the first process tells those that it starts its number."""


def follow_first_process() -> None:
    """Called before anything else: let a process that the first one has started end with it, however early.

    Until all have met, the others would wait for a first process that is no more for half an hour.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.environ[FIRST] = str(os.getpid())
        return
    end_with_parent()
    parent = str(os.getppid())
    if os.environ.get(FIRST, parent) != parent:
        sys.exit(1)  # it has gone already


def leave_process_group() -> None:
    """Called after everything else, when it went well: end the threads that talk to the other processes.

    One that frees a Python object while the interpreter ends aborts its process. Lightning ends them for NCCL alone.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


class ProcessGroup(Callback):
    """Ends the processes that Lightning started beside the first one when one of them fails.

    The first process reports a mistake that all of them make. A mistake that only another one meets (a damaged image
    in its share of the data) is reported by that one, and the first ends with its exit status.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the kernel end this process when the first one is killed."""
        if trainer.local_rank:
            end_with_parent()

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End when told to, from here on."""
        _end_when_told(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End when told to, from here on."""
        _end_when_told(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End when told to, from here on."""
        _end_when_told(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End when told to, from here on."""
        _end_when_told(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End when told to, from here on."""
        _end_when_told(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the others, or wait to be ended."""
        if trainer.local_rank:
            time.sleep(GRACE)
            return
        others: list[subprocess.Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", [])
        known = isinstance(exception, ConfigError | RunError | KeyboardInterrupt | SystemExit)
        status = None
        if not known and not is_out_of_memory(exception):
            # Perhaps only the consequence of another process's end, whose message says more than a lost connection.
            status = next((found for process in others if (found := _explained(process)) is not None), None)
        for process in others:
            process.kill()
        if status is not None:
            sys.exit(status)


def _end_when_told(trainer: Trainer) -> None:
    """Let SIGTERM end several processes that Lightning has started as Ctrl-C does.

    Lightning's own handler talks to the other processes, which may wait for something else from this one for ever.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.world_size > 1 and isinstance(environment, LightningEnvironment):
        signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: object) -> None:
    raise SIGTERMException


def _explained(process: subprocess.Popen[bytes]) -> int | None:
    """The exit status of a process that has told why it ends; None of any other."""
    try:
        status = process.wait(2 * GRACE)
    except subprocess.TimeoutExpired:
        return None
    return status if status in (MISTAKE, FAILED) else None
