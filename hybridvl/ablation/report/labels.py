"""What tells runs apart: labels they were given, or the settings in which their recipes differ."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from hybridvl.ablation.axes import label_of
from hybridvl.ablation.report.runs import RunFolder
from hybridvl.layers.errors import ConfigError

MISSING = "-"
STUDY_LABEL = "study"
"""The label that tells runs of several studies apart."""
_STAGE = "run.stage"
_SOURCE = "source."  # before the settings of the run whose model a run started from
_SEEDS = ("seed", "seed_everything")
_PLACES = ("ckpt_path", "default_root_dir", "config")
_NUMBER = re.compile(r"[-+]?\d+(\.\d+)?([eE][-+]?\d+)?|\d+/\d+")


def _leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model.net.width": 64, ...}: every value that is no mapping by its dotted key; an empty mapping is a value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= _leaves(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def differing(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Keys in which configurations differ, with the value of each as text, `MISSING` where a key is not there."""
    flats = [_leaves(config) for config in configs]
    keys = dict.fromkeys(key for values in flats for key in values)
    found = {key: [label_of(values[key]) if key in values else MISSING for values in flats] for key in keys}
    return {key: texts for key, texts in found.items() if len(set(texts)) > 1}


def labelled(runs: Sequence[RunFolder]) -> tuple[list[dict[str, str]], dict[str, list[str]]]:
    """The labels of every run, and for each label the settings that always change together with it.

    Runs without labels of their own get the settings in which they differ, seeds, folders and other places left out,
    but with those of the runs whose models they started from: of settings that change together the first, in the order
    stage, pattern, then the least deep.
    """
    without = [run for run in runs if not run.labels and run.config]
    different = differing([_compared(run) for run in without])
    different = {key: texts for key, texts in different.items() if not all(map(_is_place, texts))}
    chosen = _telling(different)
    together = {
        key: [
            other
            for other, texts in different.items()
            if other not in chosen and not other.startswith(_SOURCE) and _same_parts(texts, different[key])
        ]
        for key in chosen
    }
    own = {run.folder: dict(run.labels) for run in runs}
    for index, run in enumerate(without):
        own[run.folder] = {key: different[key][index] for key in chosen if different[key][index] != MISSING}
    if len(without) < len(runs):
        # Beside runs with labels, and where there is no recipe to compare, the name of the folder tells runs apart.
        own = {run.folder: own[run.folder] or {"run": run.folder.parent.name} for run in runs}
    names = study_names(runs)
    of_study = [{} if run.study not in names else {STUDY_LABEL: names[run.study]} for run in runs]
    return [{**study, **own[run.folder]} for study, run in zip(of_study, runs, strict=True)], together


def study_names(runs: Sequence[RunFolder]) -> dict[Path | None, str]:
    """What tells the studies of runs apart, by their folders; {} where there are fewer than two.

    Labels of different studies mean different things even where they are equal: so the study is a label of its own.
    """
    folders = sorted({run.study for run in runs if run.study is not None})
    if len(folders) < 2:
        return {}
    if any(STUDY_LABEL in run.labels for run in runs):
        raise ConfigError(
            f"an axis is called {STUDY_LABEL!r}, as the label of studies is; expected one study in a report"
        )
    if len({folder.name for folder in folders}) == len(folders):
        return {folder: folder.name for folder in folders}
    shared = os.path.commonpath(folders)
    return {folder: folder.relative_to(shared).as_posix() for folder in folders}


def mixed(runs: Sequence[RunFolder]) -> list[str]:
    """Settings in which runs differ that are said to be repetitions of each other, but for seeds and places."""
    different = differing([_compared(run) for run in runs])
    return [key for key, texts in different.items() if not all(map(_is_place, texts))]


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """The shortest end of each dotted key that no other one has: {"model.net.width": "width"}."""
    names = list(keys)
    found = {}
    for key in names:
        parts = key.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        found[key] = next(
            (end for end in ends if sum(other == end or other.endswith(f".{end}") for other in names) == 1), key
        )
    return found


def natural(label: str) -> tuple[Any, ...]:
    """A key to sort labels by: numbers and fractions by their value, before other texts by the numbers in them."""
    if _NUMBER.fullmatch(label):
        try:
            return (0, float(Fraction(label)))
        except (ValueError, ZeroDivisionError):
            pass
    return (1, [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", label) if part])


def _compared(run: RunFolder) -> dict[str, Any]:
    """The recipe without what tells runs apart that are repetitions of each other."""
    found = {}
    for key, value in _leaves({**run.config, **run.origin}).items():
        own = key
        while own.startswith(_SOURCE):
            own = own.removeprefix(_SOURCE)
        if (own == _STAGE or not own.startswith("run.")) and own.split(".")[-1] not in _SEEDS + _PLACES:
            found[key] = value
    return found


def _telling(different: Mapping[str, list[str]]) -> list[str]:
    """Of settings by key, few that tell all apart that differ in any."""

    def rank(key: str) -> tuple[Any, ...]:
        return (
            key.startswith(_SOURCE),
            key != _STAGE,
            key.split(".")[-1] != "pattern",
            MISSING in different[key],
            key.count("."),
        )

    chosen: list[str] = []
    parts: list[tuple[str, ...]] = [()] * len(next(iter(different.values()), []))
    for key in sorted(different, key=rank):
        finer = [(*part, value) for part, value in zip(parts, different[key], strict=True)]
        if len(set(finer)) > len(set(parts)):
            chosen.append(key)
            parts = finer
    return chosen


def _same_parts(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two settings tell the same runs apart."""
    return len(set(one)) == len(set(other)) == len(set(zip(one, other, strict=True)))


def _is_place(value: str) -> bool:
    """Whether a text is the path of something here; missing values and null can stand beside paths."""
    if value in (MISSING, "null"):
        return True
    return value.startswith(("/", "./", "../", "~")) or (value.count("/") > 1 and " " not in value) or _exists(value)


def _exists(value: str) -> bool:
    try:
        return "/" in value and Path(value).exists()
    except (OSError, ValueError):
        return False
