"""The Slurm engine: submitit submits jobs that share the runs of a study."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hybridvl.ablation.cells import Run
from hybridvl.ablation.engine import Engine, Onlooker, Watch
from hybridvl.ablation.local import LocalEngine, own_slots
from hybridvl.layers.errors import ConfigError

CLUSTER, TIMEOUTS = "cluster", "slurm_max_num_timeout"
"""Settings of submitit's executor itself: slurm, or local for processes of this machine; how often a job that has run
out of time is requeued."""

_MANY = 1000


def run_on_slurm(
    runs: Sequence[Run], folder: Path, jobs: int, settings: Mapping[str, Any], retry_failed: bool, watch: Watch
) -> Engine:
    """Submit jobs that do the runs together, and look on until all of them have ended.

    A job works on as many runs at a time as it has GPUs, or else cores. One that is preempted, or nears its time limit,
    is requeued by submitit; its runs go on from their last checkpoints. All nodes must see the folder under the same
    path, and its locks must hold between them.

    Args:
        runs: in this order.
        folder: of the study; jobs and their logs lie in .slurm within it.
        jobs: how many.
        settings: submitit's parameters by name, such as timeout_min, gpus_per_node and slurm_partition; `cluster` is
            the executor.
        retry_failed: whether runs that have failed are tried again.
        watch: told how it goes.

    Raises:
        ConfigError: submitit is not installed, or does not know a setting.
    """
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise ConfigError("--engine slurm: submitit is not installed; pip install 'hybridvl[slurm]'") from error

    class Share(submitit.helpers.Checkpointable):
        """A requeued job does the same: what is done by then is not done again."""

        def __call__(self, runs: Sequence[Run], retry_failed: bool, place: str) -> None:
            work_on_share(runs, retry_failed, place)

    parameters = {name: value for name, value in settings.items() if name not in (CLUSTER, TIMEOUTS)}
    cluster, timeouts = settings.get(CLUSTER, "slurm"), settings.get(TIMEOUTS, _MANY)
    onlooker = Onlooker(runs)
    try:
        executor = submitit.AutoExecutor(folder / ".slurm" / "%j", cluster=cluster, slurm_max_num_timeout=timeouts)
        executor.update_parameters(**{"name": folder.name, **parameters})
        submitted = executor.map_array(Share(), *zip(*[(list(runs), retry_failed, os.getcwd())] * jobs, strict=True))
    except (NameError, ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"--slurm: {' '.join(str(error).split())}") from error

    def cancel() -> None:
        for job in submitted:
            job.cancel(check=False)

    onlooker.follow(lambda: not all(job.done() for job in submitted), cancel, watch)
    return onlooker


def work_on_share(runs: Sequence[Run], retry_failed: bool, place: str) -> None:
    """What a job does: the runs that no other one works on, in the places that it has been given.

    place: the folder that relative paths are meant from.
    """
    os.chdir(place)
    LocalEngine(runs, own_slots(None), retry_failed, lambda engine: None).run()
