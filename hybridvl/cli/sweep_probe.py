"""How long the runs of a study would take, from a few steps of every cell in one process that is thrown away."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from hybridvl.ablation.cells import Run
from hybridvl.ablation.local import Slot, bound_to_slot
from hybridvl.cli.training import TrainingCLI
from hybridvl.layers.errors import ConfigError, RunError

_WARM_UP = 2  # steps that are not counted
_STEPS = 8
_SECONDS = 5.0  # after which a cell has been measured for long enough
_START = 60.0  # seconds that the process may need to begin
_PATIENCE = 30.0  # seconds that a cell may need
# One process, which writes nothing and validates nothing.
_ALONE = tuple(
    f"--trainer.{setting}"
    for setting in ("devices=1", "strategy=auto", "logger=false", "num_sanity_val_steps=0", "enable_progress_bar=false")
)


def measured_times(runs: Sequence[Run], slot: Slot) -> list[float | None]:
    """Seconds of training of each run, from its first steps; None for what took too long or failed."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "seconds"  # what stands on its standard output, others may have written, too
        process = subprocess.Popen(
            [sys.executable, "-m", "hybridvl.cli.sweep_probe", str(found)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **slot.environment},
            preexec_fn=bound_to_slot(slot),
            text=True,
        )
        try:
            process.communicate(json.dumps([run.arguments for run in runs]), _START + _PATIENCE * len(runs))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        lines = found.read_text().splitlines() if found.exists() else []
    return [json.loads(line) for line in lines] + [None] * (len(runs) - len(lines))


class _Enough(Exception):
    """The steps that were to be measured are done."""


class _StepTimer(Callback):
    """Measures a few steps, then ends the fit."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.steps: float = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note how many steps there would be."""
        self.steps = float(trainer.estimated_stepping_batches)
        self.times = [time.perf_counter()]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count an optimizer's step, and stop after enough of them."""
        if trainer.global_step == len(self.times):
            self.times.append(time.perf_counter())
        steps = len(self.times) - 1
        if steps >= _WARM_UP + _STEPS or (steps > _WARM_UP and self.times[-1] - self.times[0] > _SECONDS):
            raise _Enough

    @property
    def seconds(self) -> float | None:
        """Of the whole training; None without an end."""
        steps = [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)][_WARM_UP:]
        return statistics.median(steps) * self.steps if steps and self.steps < float("inf") else None


class _Probe(TrainingCLI):
    """Runs the first steps of a fit and leaves nothing."""

    timer: _StepTimer

    def _callbacks(self, progress_bar: bool, logged: bool) -> list[Callback]:
        self.timer = _StepTimer()
        return [self.timer]

    def before_fit(self) -> None:
        """Say nothing."""

    def fit(self, model: LightningModule, datamodule: Any, ckpt_path: str | None = None) -> None:
        """Run it until enough is known."""
        with contextlib.suppress(_Enough):
            self.trainer.fit(model, datamodule=datamodule)

    def after_fit(self) -> None:
        """Test nothing."""


def main() -> int:
    """Read a list of arguments of fits from standard input, add the seconds of each as a line of JSON to a file."""
    for arguments in json.load(sys.stdin):
        with tempfile.TemporaryDirectory() as folder:
            seconds = _seconds([*arguments, *_ALONE, f"--run.root={folder}", f"--trainer.default_root_dir={folder}"])
        with Path(sys.argv[1]).open("a") as file:
            file.write(f"{json.dumps(seconds)}\n")
    return 0


def _seconds(arguments: Sequence[str]) -> float | None:
    try:
        return _Probe(arguments[0], arguments[1:]).timer.seconds
    except (ConfigError, RunError, SystemExit):
        return None  # the run itself will say what is wrong


if __name__ == "__main__":
    sys.exit(main())
