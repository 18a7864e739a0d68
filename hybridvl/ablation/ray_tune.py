"""The Ray engine: Ray Tune places the runs of a study as trials on a cluster, or on this machine."""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hybridvl.ablation.cells import Run
from hybridvl.ablation.engine import Engine, Onlooker, Watch
from hybridvl.ablation.local import LocalEngine, Slot
from hybridvl.layers.errors import ConfigError

_ADDRESS = "RAY_ADDRESS"  # of a cluster, as Ray's own tools have it


def run_on_ray(
    runs: Sequence[Run], folder: Path, at_a_time: int | None, cores: int, gpus: int, retry_failed: bool, watch: Watch
) -> Engine:
    """Have Ray Tune start the runs, and look on until all trials have ended.

    It joins the cluster at RAY_ADDRESS, or starts one of this machine alone. All nodes must see the folder under the
    same path, and its locks must hold between them.

    Args:
        runs: in this order.
        folder: of the study; what Tune writes lies in .ray within it.
        at_a_time: trials at a time at most; None: as many as there are resources for.
        cores: of each trial.
        gpus: of each trial.
        retry_failed: whether runs that have failed are tried again.
        watch: told how it goes.

    Raises:
        ConfigError: Ray Tune is not installed.
    """
    try:
        import ray
        from ray import tune
    except ModuleNotFoundError as error:
        raise ConfigError("--engine ray: Ray Tune is not installed; pip install 'hybridvl[ray]'") from error
    # Not Tune's own event files beside the runs', and no second Ray where the first has been shut down.
    os.environ.update(TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1", RAY_ENABLE_AUTO_CONNECT="0")
    onlooker = Onlooker(runs)
    dashboard = None if _ADDRESS in os.environ else False  # a cluster has the one that it was started with
    ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=dashboard)
    trial = functools.partial(_trial, runs=list(runs), cores=cores, retry_failed=retry_failed, place=os.getcwd())
    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": cores, "gpu": gpus}),
        param_space={"run": tune.grid_search(list(range(len(runs))))},
        tune_config=tune.TuneConfig(max_concurrent_trials=at_a_time),
        run_config=tune.RunConfig(name=".ray", storage_path=str(folder.resolve()), verbose=0),
    )
    fitting = threading.Thread(target=tuner.fit, daemon=True)
    try:
        fitting.start()
        onlooker.follow(fitting.is_alive, ray.shutdown, watch)
    finally:
        ray.shutdown()
    return onlooker


def _trial(config: Mapping[str, Any], runs: Sequence[Run], cores: int, retry_failed: bool, place: str) -> None:
    """One run; Ray has set which GPUs there are."""
    from ray import tune

    os.chdir(place)
    run = runs[config["run"]]
    # Ray counts cores, and does not bind trials to them.
    slot = Slot(tuple(range(cores)), bound=False)
    engine = LocalEngine([run], [slot], retry_failed, lambda engine: None)
    engine.run()
    tune.report({"status": engine.statuses[0], **engine.records[0].metrics.get("metrics", {})})
