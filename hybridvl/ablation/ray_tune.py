"""The Ray engine: Ray Tune places the runs of a study as trials on a cluster, or on this machine."""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybridvl.ablation.engine import Engine, Onlooker, SignalFile, Work
from hybridvl.ablation.local import LocalEngine, Slot
from hybridvl.ablation.records import Hold, RunRecord
from hybridvl.layers.errors import ConfigError

_ADDRESS = "RAY_ADDRESS"  # of a cluster, as Ray's own tools have it
_FOLDER = ".ray"


def run_on_ray(work: Work, at_a_time: int | None, cores: int) -> Engine:
    """Have Ray Tune start the runs, and look on until all trials have ended.

    It joins the cluster at RAY_ADDRESS, or starts one of this machine alone. All nodes must see the folder under the
    same path, and its locks must hold between them. Each trial has a GPU to itself if the cluster has any, whether this
    machine has one or not. What Tune writes lies in .ray in the study's folder.

    Args:
        work: the runs; those to do become trials.
        at_a_time: trials at a time at most; None: as many as there are resources for.
        cores: of each trial.

    Raises:
        ConfigError: Ray Tune is not installed.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ConfigError(
            '--engine ray: Ray Tune is not installed; pip install -c constraints.txt -e ".[ray]"'
        ) from error
    onlooker = Onlooker(work, work.folder / _FOLDER)
    share = onlooker.share
    if not share.runs:
        onlooker.follow(lambda: False)
        return onlooker
    # Not Tune's own event files beside the runs', no second Ray where the first has been shut down, and no other table.
    os.environ.update(TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1", RAY_ENABLE_AUTO_CONNECT="0", RAY_AIR_NEW_OUTPUT="0")
    dashboard = None if _ADDRESS in os.environ else False  # a cluster has the one that it was started with
    with onlooker.signals_handed_on():
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=dashboard)
        try:
            gpus = int(ray.cluster_resources().get("GPU", 0) >= 1)
            tuner = _tuner(share, onlooker.signals, at_a_time, {"cpu": cores, "gpu": gpus})
            found: list[Any] = []
            fitting = threading.Thread(target=lambda: found.append(tuner.fit()), daemon=True)
            fitting.start()
            with onlooker.signals_handed_on():  # once more: Ray has put handlers of its own in their place
                onlooker.follow(fitting.is_alive)
        finally:
            ray.shutdown()
    if onlooker.signal is None:
        onlooker.troubles += _troubles(found)
    return onlooker


def _tuner(share: Work, signals: SignalFile, at_a_time: int | None, resources: Mapping[str, int]) -> Any:
    from ray import tune

    class NoMore(tune.Stopper):
        """Starts no trial after a signal, once those that have got it have stopped."""

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return signals.count > 0 and not any(Hold.is_held(RunRecord(run.folder)) for run in share.runs)

    trial = functools.partial(_trial, share=share, cores=resources["cpu"], place=os.getcwd(), signals=signals)
    return tune.Tuner(
        tune.with_resources(trial, dict(resources)),
        param_space={"run": tune.grid_search(list(range(len(share.runs))))},
        tune_config=tune.TuneConfig(max_concurrent_trials=at_a_time),
        run_config=tune.RunConfig(name=_FOLDER, storage_path=str(share.folder.resolve()), verbose=0, stop=NoMore()),
    )


def _trial(config: Mapping[str, Any], share: Work, cores: int, place: str, signals: SignalFile) -> None:
    """One run; Ray has set which GPUs there are."""
    from ray import tune

    os.chdir(place)
    # Ray counts cores, and does not bind trials to them.
    slot = Slot(tuple(range(cores)), bound=False)
    engine = LocalEngine(replace(share, runs=[share.runs[config["run"]]]), [slot], signals)
    engine.run()
    tune.report({"status": engine.statuses[0], **engine.records[0].metrics.get("metrics", {})})


def _troubles(found: list[Any]) -> list[str]:
    """What Tune, or single trials, failed of."""
    if not found:
        return ["Ray Tune has given up; what it said stands above"]
    failed = [result for result in found[0] if result.error is not None]
    return [f"trial failed: {str(result.error).strip().splitlines()[-1]} (log: {result.path})" for result in failed]
