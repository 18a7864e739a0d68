"""A few runs side by side: the settings in which they differ, and what they measured."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hybridvl.ablation.report.cache import Cache
from hybridvl.ablation.report.folders import CONFIG
from hybridvl.ablation.report.labels import differing
from hybridvl.ablation.report.metrics import logged_metrics
from hybridvl.ablation.report.runs import RunFolder, read_run
from hybridvl.checkpoints.files import usable_path
from hybridvl.layers.errors import ConfigError

_PLACES = ("run.root", "run.name", "run.version")  # which the names of the runs tell
_FACTS = ("pattern", "parameters", "trainable_parameters", "steps", "tokens", "seconds")


@dataclass(frozen=True)
class Comparison:
    """Runs side by side; every list has an entry for each of them.

    Attributes:
        runs: in the order asked for.
        names: of the runs, short and all different unless a run was given twice.
        settings: values as text of the recipes' dotted keys that differ; "-" where a recipe has no such key.
        outcomes: status, and what metrics.json says beside metrics, as text, "" where nothing is known.
        metrics: the last value of each, None where a run has none.
    """

    runs: list[RunFolder]
    names: list[str]
    settings: Mapping[str, list[str]]
    outcomes: Mapping[str, list[str]]
    metrics: Mapping[str, list[float | None]]


def compare_runs(paths: Sequence[str | Path]) -> Comparison:
    """Read run folders and set them side by side.

    Raises:
        ConfigError: a path that is no folder, or has no config.yaml that can be read.
    """
    runs = [_run(path) for path in paths]
    settings = differing([run.config for run in runs])
    outcomes = {"status": [f"{run.status}: {run.reason}" if run.reason else run.status for run in runs]}
    for name in _FACTS:
        outcomes[name] = ["" if run.facts.get(name) is None else _text(run.facts[name]) for run in runs]
    return Comparison(
        runs=runs,
        names=_names([run.folder for run in runs]),
        settings={key: texts for key, texts in settings.items() if key not in _PLACES},
        outcomes={name: texts for name, texts in outcomes.items() if any(texts)},
        metrics={name: [run.metrics.get(name) for run in runs] for name in logged_metrics(runs)},
    )


def _run(path: str | Path) -> RunFolder:
    folder = usable_path(path)
    if not folder.is_dir():
        raise ConfigError(f"{path}: no such folder; expected a run folder, such as runs/digits/version_0")
    if not (folder / CONFIG).is_file():
        inside = sorted(found.parent for found in (*folder.glob(f"*/{CONFIG}"), *folder.glob(f"*/*/{CONFIG}")))
        hint = f"; there are {', '.join(map(str, inside[:4]))}"
        more = " and others" if len(inside) > 4 else ""
        raise ConfigError(f"{path}: no {CONFIG} in it; expected a run folder{hint + more if inside else ''}")
    run = read_run(folder, os.listdir(folder), Cache())
    for problem in run.problems:
        if problem.startswith(CONFIG):
            raise ConfigError(f"{path}: {problem}; expected the recipe that hybridvl fit has written")
    return run


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders as seen from the one that they share, without what all of their names end with."""
    if len(set(folders)) == 1:
        return [folder.name for folder in folders]
    shared = os.path.commonpath(folders)
    parts = [Path(os.path.relpath(folder, shared)).parts for folder in folders]
    while len({part[-1] for part in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [part[:-1] for part in parts]
    return ["/".join(part) for part in parts]


def _text(value: object) -> str:
    return f"{value:,}" if isinstance(value, int | float) else str(value)
