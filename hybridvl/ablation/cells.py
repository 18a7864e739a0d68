"""The cells of a study, one for each combination of labels, and their runs, one for each seed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridvl.ablation.axes import axis_values, is_excluded
from hybridvl.ablation.recipes import merged_recipe, same_recipe
from hybridvl.ablation.study import Study
from hybridvl.layers.errors import ConfigError
from hybridvl.pipeline.mappings import fit_words, read_mapping
from hybridvl.pipeline.references import filled

_LONGEST_NAME = 120  # characters of a cell's folder
_FRACTION = re.compile(r"(?<=\d)/(?=\d)")
_LOOKS_LIKE_FRACTION = re.compile(r"\d-\d")
_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]+")


@dataclass(frozen=True)
class Cell:
    """One combination of labels.

    Attributes:
        labels: by axis.
        overrides: values of the recipe by path, those of the study and of its axes.
        name: of the folder of its runs.
    """

    labels: dict[str, str]
    overrides: dict[str, Any]
    name: str


@dataclass(frozen=True)
class Run:
    """One fit.

    Attributes:
        cell: of which it is a run.
        seed: of all that is drawn.
        folder: the run folder.
        arguments: what follows `hybridvl`.
        key: a digest of all that decides what the run does: recipes, overrides and seed.
    """

    cell: Cell
    seed: int
    folder: Path
    arguments: list[str]
    key: str


def cells(study: Study) -> list[Cell]:
    """The cells of a study in the order of its file, see `Study.combinations`; ConfigError if two are the same."""
    found = [cell_of(study, labels) for labels in study.combinations()]
    by_content: dict[str, Cell] = {}
    recipes = [read_mapping(path) for path in study.recipes]
    for cell in found:
        same = by_content.setdefault(same_recipe(merged_recipe(recipes, cell.overrides)), cell)
        if same is not cell:
            raise ConfigError(
                f"{study.path}: axes: the cells {same.name} and {cell.name} are the same, as both set "
                f"{json.dumps(cell.overrides, default=str)}; expected values that differ"
            )
    return found


def baseline_of(study: Study, found: Sequence[Cell], cell: Cell) -> Cell | None:
    """The cell that a cell is compared with: it has the baseline's labels, and the cell's own on the other axes.

    None when that one is excluded. In a search it is there to be matched with, whether or not it is a trial.
    """
    labels = {**cell.labels, **study.baseline}
    if study.search is not None:
        return None if is_excluded(labels, study.exclude) else cell_of(study, labels)
    return next((other for other in found if other.labels == labels), None)


def runs(study: Study, found: Sequence[Cell]) -> list[Run]:
    """The runs of cells: all with the first seed, then all with the second, and so on."""
    recipes = [read_mapping(path) for path in study.recipes]
    return [_run(study, cell, seed, recipes) for seed in study.seeds for cell in found]


def cell_name(labels: Mapping[str, str]) -> str:
    """A folder's name for labels by axis, such as "ratio=1-4,window=16", from characters that any system takes.

    A label that cannot be read off its part of the name ends with a digest there, so that names of different labels
    differ. A name depends on its own labels alone.
    """
    name = ",".join(f"{axis}={_safe(label)}" for axis, label in labels.items()) or "all"
    if len(name) <= _LONGEST_NAME:
        return name
    digest = _digest(json.dumps(labels))
    return f"{name[: _LONGEST_NAME - len(digest)]}{digest}"


def with_override(cell: Cell, path: str, value: Any) -> Cell:
    """The cell with a value of the recipe changed; its name stays."""
    return dataclasses.replace(cell, overrides=_folded({**cell.overrides, path: value}))


def cell_of(study: Study, labels: dict[str, str]) -> Cell:
    """The cell that has a label of every axis."""
    values = axis_values(study.axes, labels)
    overrides: dict[str, Any] = {}
    for source in (study.overrides, *(axis.overrides(values[f"axes.{axis.name}"]) for axis in study.axes)):
        overrides |= filled(source, values)
    return Cell(labels, _folded(overrides), cell_name(labels))


def _folded(overrides: dict[str, Any]) -> dict[str, Any]:
    """The same without paths that lie within the mapping of another path: they are put into it."""
    found: dict[str, Any] = {}
    for path in sorted(overrides, key=lambda path: path.count(".")):
        above = next((other for other in found if path.startswith(f"{other}.") and _is_mapping(found[other])), None)
        if above is None:
            found[path] = overrides[path]
        else:
            found[above] = _with(found[above], path.removeprefix(f"{above}.").split("."), overrides[path])
    return {path: found[path] for path in overrides if path in found}


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _with(value: Mapping[str, Any], path: list[str], entry: Any) -> dict[str, Any]:
    """A mapping with an entry at a path."""
    if len(path) == 1:
        return {**value, path[0]: entry}
    below = value.get(path[0])
    return {**value, path[0]: _with(below if isinstance(below, Mapping) else {}, path[1:], entry)}


def _run(study: Study, cell: Cell, seed: int, recipes: list[dict[str, Any]]) -> Run:
    folder = study.folder / cell.name / f"seed_{seed}"
    own = {
        "seed_everything": seed,
        "run.root": str(study.folder),
        "run.name": cell.name,
        "run.version": folder.name,
        "run.labels": cell.labels,
        "run.metrics": list(study.metrics),
    }
    decides = [recipes, cell.overrides, seed]
    key = hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()
    return Run(cell, seed, folder, fit_words(study.recipes, {**cell.overrides, **own}), key)


def _safe(label: str) -> str:
    """A label in safe characters: 1/4 becomes 1-4."""
    name = _UNSAFE.sub("_", _FRACTION.sub("-", label))
    ambiguous = name != _FRACTION.sub("-", label) or _LOOKS_LIKE_FRACTION.search(label) or name.endswith(".")
    return f"{name.strip('._')}{_digest(label)}" if ambiguous else name


def _digest(text: str) -> str:
    return f"~{hashlib.sha256(text.encode()).hexdigest()[:6]}"
