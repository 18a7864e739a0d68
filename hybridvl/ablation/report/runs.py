"""The runs in given folders: what each was, how it ended, what it measured."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hybridvl.ablation.report.cache import Cache, Content
from hybridvl.ablation.report.events import Curve, merged
from hybridvl.checkpoints.files import usable_path
from hybridvl.layers.errors import ConfigError

DONE = "done"
_INSIDE = ("checkpoints", "model")  # of a run folder; nothing in them is a run
_EVENTS = "events.out.tfevents"
_STUDY = "study.yaml"


@dataclass(frozen=True)
class Run:
    """One run, whether or not it came to an end.

    Attributes:
        folder: of the run; it is not there for a fit that was refused.
        name: its folder as seen from the folder that all runs of a report share.
        status: "done", "pruned", "failed", "killed" or "unfinished".
        reason: why it is not done, for people; "" for one that is.
        seed: of the run; None where nothing says it.
        labels: what it was given to be compared by; empty for runs that were given nothing.
        config: the resolved recipe; {} where there is none.
        origin: {"source": RECIPE} of the run whose model this one started from, which has a "source" of its own if
            that one started from another; {} where it started from none that is there.
        metrics: the last finite value of each, by name.
        facts: what else metrics.json says: pattern, parameters, steps, tokens, seconds and so on.
        curves: scalars over steps, by name.
        started: when, in ns since 1970, to tell the newer of two runs.
        problems: files that could not be read, and numbers that are none.
    """

    folder: Path
    name: str
    status: str
    reason: str
    seed: int | None
    labels: Mapping[str, str]
    config: Mapping[str, Any]
    metrics: Mapping[str, float]
    facts: Mapping[str, Any]
    curves: Mapping[str, Curve]
    origin: Mapping[str, Any] = field(default_factory=dict)
    started: int = 0
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Collected:
    """What was found.

    Attributes:
        runs: by folder.
        studies: study.yaml of every study among the given folders.
        problems: of files that belong to no run.
    """

    runs: list[Run]
    studies: list[Mapping[str, Any]] = field(default_factory=list)
    problems: tuple[str, ...] = ()


def collect(paths: Sequence[str | Path], cache: Cache) -> Collected:
    """All runs in folders, at any depth.

    A run is a folder with config.yaml, events or metrics.json, or a record of a start beside where its folder would be.

    Raises:
        ConfigError: a path that is no folder, or one without any run.
    """
    runs: dict[Path, Run] = {}
    studies: dict[Path, Mapping[str, Any]] = {}
    problems: list[str] = []
    for path in paths:
        top = usable_path(path)
        if not top.is_dir():
            raise ConfigError(f"{path}: no such folder; expected run folders, or folders with runs in them")
        found = False
        for folder, files in _run_folders(top.absolute()):
            if _STUDY in files:
                study = cache.content(folder / _STUDY)
                if study is not None and study.problem:
                    problems.append(f"{folder / _STUDY}: {study.problem}")
                elif study is not None:
                    studies[folder] = study.values
                continue
            found = True
            runs[folder] = read_run(folder, files, cache)
        if not found:
            raise ConfigError(f"{path}: no run in it; expected folders with config.yaml, as hybridvl fit leaves them")
    shared = Path(os.path.commonpath([folder.parent for folder in runs]))
    named = [replace(runs[folder], name=folder.relative_to(shared).as_posix()) for folder in sorted(runs)]
    return Collected(named, list(studies.values()), tuple(problems))


def read_run(folder: Path, files: Sequence[str], cache: Cache) -> Run:
    """One run from its folder, whose file names are given, and the records beside it."""
    problems: list[str] = []

    def values(path: Path) -> dict[str, Any]:
        content = cache.content(path)
        if content is not None and content.problem:
            problems.append(f"{path.name}: {content.problem}")
        return {} if content is None else content.values

    config, summary = values(folder / "config.yaml"), values(folder / "metrics.json")
    ends = ("json", "ended.json", "pruned.json")
    start, ended, pruned = (values(folder.with_name(f"{folder.name}.{end}")) for end in ends)
    progress = values(folder / "progress.json")
    parts = []
    for name in sorted(name for name in files if name.startswith(_EVENTS)):
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
    return Run(
        folder=folder,
        name="/".join(folder.parts[-2:]),
        status=status,
        reason=reason,
        seed=_seed(config, start),
        labels={str(k): str(v) for k, v in _mapping(_labels(config) or start.get("labels")).items()},
        config=config,
        metrics=metrics,
        facts={name: value for name, value in summary.items() if name != "metrics"},
        curves=curves,
        origin=_origin(config, cache),
        started=_changed(folder / "config.yaml"),
        problems=tuple(problems),
    )


def _run_folders(top: Path) -> Iterator[tuple[Path, list[str]]]:
    """Run folders with their files, folders of refused runs without any, and folders of studies with study.yaml."""
    for place, folders, files in os.walk(top):
        here = Path(place)
        if "config.yaml" in files or "metrics.json" in files or any(name.startswith(_EVENTS) for name in files):
            folders.clear()
            yield here, files
            continue
        if _STUDY in files:
            yield here, [_STUDY]
        folders[:] = sorted(name for name in folders if name not in _INSIDE and not name.startswith("."))
        records = {name.removesuffix(".json") for name in files if name.endswith(".json")}
        for name in sorted(name for name in records if f"{name}.ended" in records or f"{name}.log" in files):
            if name not in folders or not (here / name / "config.yaml").exists():
                folders[:] = [folder for folder in folders if folder != name]
                yield here / name, os.listdir(here / name) if (here / name).is_dir() else []


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
    content = cache.content(Path(source).parent / "config.yaml")
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
