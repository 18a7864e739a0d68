"""The Slurm engine: submitit submits jobs that share the runs of a study."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hybridvl.ablation.engine import Engine, Onlooker, SignalFile, Work
from hybridvl.ablation.local import LocalEngine, own_slots
from hybridvl.ablation.study import Study
from hybridvl.layers.errors import ConfigError

CLUSTER, TIMEOUTS = "cluster", "slurm_max_num_timeout"
"""Settings of submitit's executor itself: slurm, or local for processes of this machine; how often a job that has run
out of time is requeued."""

_MANY = 1000
_GRACE = 5.0  # seconds
_CLUSTERS = ("slurm", "local")


def run_on_slurm(work: Work, jobs: int, settings: Mapping[str, Any], search: Study | None = None) -> Engine:
    """Submit jobs that do the runs together, and look on until all of them have ended.

    A job works on as many runs at a time as it has GPUs, or else cores. One that is preempted, or nears its time limit,
    is requeued by submitit; its runs go on from their last checkpoints. All nodes must see the folder under the same
    path, and its locks must hold between them. Jobs and their logs lie in .slurm in the study's folder.

    Args:
        work: the runs.
        jobs: how many at most; there are no more than runs to do.
        settings: submitit's parameters by name, such as timeout_min, gpus_per_node and slurm_partition; `cluster` is
            the executor.
        search: the study, if its runs are those of a search, which the jobs choose together; `work` has none then.

    Raises:
        ConfigError: submitit is not installed, or does not know a setting, or Slurm refuses the jobs.
    """
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise ConfigError(
            '--engine slurm: submitit is not installed; pip install -c constraints.txt -e ".[slurm]"'
        ) from error

    class Share(submitit.helpers.Checkpointable):
        """A requeued job does the same: what is done by then is not done again."""

        def __call__(self, work: Work, place: str, signals: SignalFile, search: Study | None) -> None:
            work_on_share(work, place, signals, search)

    cluster = _cluster(settings)
    parameters = {name: value for name, value in settings.items() if name not in (CLUSTER, TIMEOUTS)}
    folder = work.folder / ".slurm"
    onlooker = Onlooker(work, folder) if search is None else _search_onlooker(search, work, folder)
    count = min(jobs, len(onlooker.left) + onlooker.ahead)
    submitted: list[Any] = []

    def cancel() -> None:
        if cluster == "slurm":  # processes of this machine need no more than to be told
            for job in submitted:
                job.cancel(check=False)

    with onlooker.signals_handed_on(cancel):
        try:
            timeouts = settings.get(TIMEOUTS, _MANY)
            executor = submitit.AutoExecutor(folder / "%j", cluster=cluster, slurm_max_num_timeout=timeouts)
            executor.update_parameters(**{"name": work.folder.name, **parameters})
            if count:
                words = zip(*[(onlooker.share, os.getcwd(), onlooker.signals, search)] * count, strict=True)
                with _deaf_to_interrupts():
                    submitted += executor.map_array(Share(), *words)
        except (NameError, ValueError, TypeError, RuntimeError) as error:
            raise ConfigError(f"--slurm: {' '.join(str(error).split())}") from error
        if onlooker.signal is not None:  # it came before there was anything to cancel
            cancel()
        onlooker.follow(lambda: not all(job.done() for job in submitted))
    if onlooker.signal is None:
        onlooker.troubles += [_trouble(job) for job in _failed(submitted)]
    return onlooker


def work_on_share(work: Work, place: str, signals: SignalFile, search: Study | None = None) -> None:
    """What a job does: the runs that no other one works on, in the places that it has been given.

    Args:
        work: the runs.
        place: the folder that relative paths are meant from.
        signals: those of the sweep.
        search: see `run_on_slurm`.
    """
    os.chdir(place)
    if search is None:
        LocalEngine(work, own_slots(None), signals).run()
        return
    from hybridvl.ablation.search.engine import SearchEngine  # Optuna is for searches alone

    SearchEngine(search, work, own_slots(None), signals).run()


def _search_onlooker(search: Study, work: Work, folder: Path) -> Onlooker:
    from hybridvl.ablation.search.engine import SearchOnlooker

    return SearchOnlooker(search, work, folder)


def _cluster(settings: Mapping[str, Any]) -> str:
    found = str(settings.get(CLUSTER, _CLUSTERS[0]))
    if found not in _CLUSTERS:
        raise ConfigError(f"--slurm.{CLUSTER}: {found}; expected one of {', '.join(_CLUSTERS)}")
    if found == "slurm" and shutil.which("srun") is None:
        raise ConfigError(
            "--engine slurm: no srun here; expected a machine with Slurm's commands, or --slurm.cluster local for "
            "processes of this one"
        )
    return found


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """What is started meanwhile never gets a terminal's Ctrl-C, which goes to the whole process group; this process
    gets it afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _failed(jobs: Sequence[Any]) -> list[Any]:
    """The jobs without a good result, which may come a little late where they are on other machines."""
    until = time.monotonic() + _GRACE
    while time.monotonic() < until and not all(job.paths.result_pickle.exists() for job in jobs):
        time.sleep(_GRACE / 10)
    return [job for job in jobs if not job.paths.result_pickle.exists() or job.exception() is not None]


def _trouble(job: Any) -> str:
    """What a job that failed has said last, and where the rest is."""
    logs = [Path(path) for path in (job.paths.stderr, job.paths.stdout)]
    lines = [line.strip() for line in (job.stderr() or job.stdout() or "").splitlines() if line.strip()]
    log = next((path for path in logs if path.exists()), logs[0].parent)
    return f"job {job.job_id} failed: {lines[-1] if lines else 'it has printed nothing'} (log: {log})"
