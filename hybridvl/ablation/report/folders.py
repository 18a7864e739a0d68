"""Where runs are in a tree of folders, and what lies beside them that is none."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

EVENTS = "events.out.tfevents"
STUDY = "study.yaml"
CONFIG, METRICS = "config.yaml", "metrics.json"
_INSIDE = ("checkpoints", "model")  # of a run folder; nothing in them is a run


@dataclass(frozen=True)
class Walked:
    """What was found.

    Attributes:
        runs: files of every run folder; none for one that is not there, as of a fit that was refused.
        studies: folders with a study's file.
        stray: folders above runs that have files of a run and are none.
        recorded: runs with a record of their start.
    """

    runs: dict[Path, list[str]] = field(default_factory=dict)
    studies: list[Path] = field(default_factory=list)
    stray: list[Path] = field(default_factory=list)
    recorded: set[Path] = field(default_factory=set)


def walked(top: Path) -> Walked:
    """The runs in a folder, at any depth, links followed, each once.

    A run has config.yaml, metrics.json or events, or a record of its start beside where its folder would be. Above
    other runs it takes config.yaml and one of the others: a single one may be anything's.
    """
    found = Walked()
    _walk(top, found, set())
    return found


def _walk(place: Path, found: Walked, seen: set[tuple[int, int]]) -> None:
    facts = place.stat()
    if (facts.st_dev, facts.st_ino) in seen:
        return
    seen.add((facts.st_dev, facts.st_ino))
    files, folders = _entries(place)
    if STUDY in files:
        found.studies.append(place)
    below = Walked()
    for name in folders:
        _walk(place / name, below, seen)
    for name in _recorded(files):
        below.recorded.add(place / name)
        if (place / name) not in below.runs:
            below.runs[place / name] = _entries(place / name)[0] if name in folders else []
    measured = METRICS in files or any(name.startswith(EVENTS) for name in files)
    if measured or CONFIG in files:
        # What tools write below a run, such as events of their own, is no run; what has a recipe or a record is one.
        for run in [run for run, own in below.runs.items() if CONFIG not in own and run not in below.recorded]:
            del below.runs[run]
        if below.runs and not (measured and CONFIG in files):
            found.stray.append(place)
        else:
            found.runs[place] = files
    found.runs.update(below.runs)
    found.recorded.update(below.recorded)
    found.studies.extend(below.studies)
    found.stray.extend(below.stray)


def _entries(place: Path) -> tuple[list[str], list[str]]:
    """Names of the files, and of the folders in which runs may be: links last, so that a run goes by its own place."""
    files: list[str] = []
    folders: list[tuple[bool, str]] = []
    try:
        with os.scandir(place) as entries:
            for entry in entries:
                if not _is_folder(entry):
                    files.append(entry.name)
                elif entry.name not in _INSIDE and not entry.name.startswith("."):
                    folders.append((entry.is_symlink(), entry.name))
    except PermissionError:
        return [], []
    return sorted(files), [name for _, name in sorted(folders)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _recorded(files: list[str]) -> list[str]:
    """Names of runs by the records of their starts beside them."""
    records = {name.removesuffix(".json") for name in files if name.endswith(".json")}
    return sorted(name for name in records if f"{name}.ended" in records or f"{name}.log" in files)
