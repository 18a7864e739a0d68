"""The runs in given folders: what each was, how it ended, what it measured."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hybridvl.ablation.report.cache import Cache, Content
from hybridvl.ablation.report.events import Curve, merged
from hybridvl.ablation.report.folders import CONFIG, EVENTS, METRICS, STUDY, walked
from hybridvl.checkpoints.files import usable_path
from hybridvl.layers.errors import ConfigError

DONE = "done"
_DEPTH = 3  # folders above a run in which its study's file is looked for


@dataclass(frozen=True)
class RunFolder:
    """One run, whether or not it came to an end.

    Attributes:
        folder: of the run; it is not there for a fit that was refused.
        path: the same as reports write it, by the path that a person gave: one that does not name the machine's folders
            stays true where the runs are moved or the report is handed on.
        name: its folder as seen from the folder that all runs of a report share.
        status: "done", "pruned", "failed", "killed" or "unfinished".
        reason: why it is not done, for people; "" for one that is.
        seed: of the run; None where nothing says it.
        labels: what it was given to be compared by; empty for runs that were given nothing.
        config: the resolved recipe; {} where there is none.
        study: the folder of the study that the run is one of; None for others.
        origin: {"source": RECIPE} of the run whose model this one started from, which has a "source" of its own if
            that one started from another; {} where it started from none that is there.
        metrics: the last finite value of each, by name.
        facts: what else metrics.json says: pattern, parameters, steps, tokens, seconds and so on.
        curves: scalars over steps, by name.
        started: when, in ns since 1970, to tell the newer of two runs.
        problems: files that could not be read, and numbers that are none.
    """

    folder: Path
    path: Path
    name: str
    status: str
    reason: str
    seed: int | None
    labels: Mapping[str, str]
    config: Mapping[str, Any]
    metrics: Mapping[str, float]
    facts: Mapping[str, Any]
    curves: Mapping[str, Curve]
    study: Path | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)
    started: int = 0
    problems: tuple[str, ...] = ()

    def section(self, *keys: str) -> Mapping[str, Any]:
        """A mapping in the recipe, such as that of data.task; {} where there is none."""
        found: Any = self.config
        for key in keys:
            found = _mapping(found).get(key)
        return _mapping(found)


@dataclass(frozen=True)
class Collected:
    """What was found.

    Attributes:
        runs: by folder.
        studies: study.yaml of every study among the given folders, by its folder.
        problems: of files that belong to no run.
    """

    runs: list[RunFolder]
    studies: Mapping[Path, Mapping[str, Any]] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


def collect(paths: Sequence[str | Path], cache: Cache) -> Collected:
    """All runs in folders, at any depth.

    A run is a folder with config.yaml, events or metrics.json, or a record of a start beside where its folder would be.

    Raises:
        ConfigError: a path that is no folder, or one without any run.
    """
    runs: dict[Path, RunFolder] = {}
    studies: dict[Path, Mapping[str, Any]] = {}
    problems: list[str] = []
    for path in paths:
        top = usable_path(path)
        if not top.is_dir():
            raise ConfigError(f"{path}: no such folder; expected run folders, or folders with runs in them")
        above = top.absolute()
        found = walked(above)
        if not found.runs:
            raise ConfigError(f"{path}: no run in it; expected folders with config.yaml, as hybridvl fit leaves them")
        problems += [
            f"{top / stray.relative_to(above)}: its {CONFIG} or metrics lie above runs, and are of none"
            for stray in found.stray
        ]
        for folder, files in found.runs.items():
            runs.setdefault(folder.resolve(), read_run(top / folder.relative_to(above), files, cache))
        for folder in found.studies:
            study = cache.content(folder / STUDY)
            if study is not None and study.problem:
                problems.append(f"{top / folder.relative_to(above) / STUDY}: {study.problem}")
            elif study is not None:
                studies[folder] = study.values
    shared = Path(os.path.commonpath([run.folder.parent for run in runs.values()]))
    listed = sorted(runs.values(), key=lambda run: run.folder)
    named = [replace(run, name=run.folder.relative_to(shared).as_posix()) for run in listed]
    return Collected(named, studies, tuple(dict.fromkeys(problems)))


def read_run(path: Path, files: Sequence[str], cache: Cache) -> RunFolder:
    """One run from its folder by the path that a person gave, with its file names, and the records beside it."""
    folder = path.absolute()
    problems: list[str] = []

    def values(file: Path) -> dict[str, Any]:
        content = cache.content(file)
        if content is not None and content.problem:
            problems.append(f"{file.name}: {content.problem}")
        return {} if content is None else content.values

    config, summary = values(folder / CONFIG), values(folder / METRICS)
    ends = ("json", "ended.json", "pruned.json")
    start, ended, pruned = (values(folder.with_name(f"{folder.name}.{end}")) for end in ends)
    progress = values(folder / "progress.json")
    parts = []
    for name in sorted(name for name in files if name.startswith(EVENTS)):
        content = cache.content(folder / name) or Content({}, {})
        if content.problem:
            problems.append(f"{name}: {content.problem}; it was skipped")
        parts.append(content.curves)
    curves = merged(parts)
    latest = {name: float(curve.values[-1]) for name, curve in curves.items() if len(curve.values)}
    written = _mapping(summary.get("metrics"))
    latest |= {name: float(value) for name, value in written.items() if isinstance(value, int | float)}
    metrics = {name: value for name, value in latest.items() if math.isfinite(value)}
    if len(metrics) < len(latest):
        problems.append(f"not a number: {', '.join(sorted(set(latest) - set(metrics)))}")
    has_mark = (folder / "done.json").exists()
    last = max((int(curve.steps[-1]) for curve in curves.values() if len(curve.steps)), default=None)
    status, reason = _status(config, summary, start, ended, {"step": last, **progress}, has_mark)
    if pruned:
        status, reason = "pruned", str(pruned.get("reason"))
    return RunFolder(
        folder=folder,
        path=path,
        name="/".join(folder.parts[-2:]),
        status=status,
        reason=reason,
        seed=_seed(config, start),
        labels={str(k): str(v) for k, v in _mapping(_labels(config) or start.get("labels")).items()},
        config=config,
        metrics=metrics,
        facts={name: value for name, value in summary.items() if name != "metrics"},
        curves=curves,
        study=next((place for place in list(folder.parents)[:_DEPTH] if (place / STUDY).is_file()), None),
        origin=_origin(config, cache),
        started=_changed(folder / CONFIG),
        problems=tuple(problems),
    )


def _status(
    config: Mapping[str, Any],
    summary: Mapping[str, Any],
    start: Mapping[str, Any],
    ended: Mapping[str, Any],
    progress: Mapping[str, Any],
    marked: bool,
) -> tuple[str, str]:
    """How a run ended, and why it is not done."""
    if "ended" in summary or marked or ("labels" not in start and _looks_whole(config, summary)):
        return DONE, ""
    where = _progress(summary, progress)
    status, number = ended.get("status"), ended.get("signal")
    said = str(ended.get("reason") or "")
    if isinstance(number, int) or (isinstance(status, int) and status < 0):
        name = _signal_name(number if isinstance(number, int) else -int(status or 0))
        return "killed", f"by {name}, {where}"
    if isinstance(status, int) and status > 0:
        return "failed", said or f"exit status {status}, {where}"
    if isinstance(status, int):
        return "unfinished", said or f"its process ended before the run did, {where}"
    if not config:
        return "unfinished", "no config.yaml: it ended before its first step, or has just begun"
    return "unfinished", f"no record of its end: killed, or still running, {where}"


def _looks_whole(config: Mapping[str, Any], summary: Mapping[str, Any]) -> bool:
    """Whether a run without any mark of its end has all that a fit leaves."""
    tested = any(name.startswith("test/") for name in _mapping(summary.get("metrics")))
    return bool(summary) and (tested or _mapping(config.get("run")).get("test") is False)


def _progress(summary: Mapping[str, Any], progress: Mapping[str, Any]) -> str:
    step, steps = progress.get("step") or summary.get("steps"), progress.get("steps")
    if not step:
        return "before its first step was logged"
    doing = {"test": "in its test, ", "validate": "in a validation, "}.get(str(progress.get("doing")), "")
    return f"{doing}at step {step}" + (f" of {steps}" if steps is not None else "")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _origin(config: Mapping[str, Any], cache: Cache, stages: int = 8) -> dict[str, Any]:
    """The recipes of the runs before this one, by their exported models, for at most so many stages."""
    model = _mapping(config.get("model"))
    source = model.get("source") or _mapping(model.get("student")).get("source")
    if not stages or not isinstance(source, str) or Path(source).name != "model":
        return {}
    content = cache.content(Path(source).parent / CONFIG)
    if content is None or content.problem:
        return {}
    return {"source": {**content.values, **_origin(content.values, cache, stages - 1)}}


def _labels(config: Mapping[str, Any]) -> Any:
    return _mapping(config.get("run")).get("labels")


def _seed(config: Mapping[str, Any], start: Mapping[str, Any]) -> int | None:
    seed = config.get("seed_everything", start.get("seed"))
    return seed if isinstance(seed, int) and not isinstance(seed, bool) else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
