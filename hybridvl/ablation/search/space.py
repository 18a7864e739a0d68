"""What a search of a study is to do: how many trials, by which metric, drawn how, and given up when."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hybridvl.ablation.axes import Axis, is_excluded
from hybridvl.layers.errors import ConfigError
from hybridvl.pipeline.mappings import require_known, require_mapping

Sampler = Literal["random", "tpe"]
Pruner = Literal["none", "median", "hyperband"]
Direction = Literal["max", "min"]

SEARCH_KEYS = ("sampler", "trials", "metric", "direction", "pruner", "seed", "startup")
"""Keys of a search."""

_MOST_COUNTED = 100_000  # cells that are looked at one by one


@dataclass(frozen=True)
class Search:
    """How cells are chosen one after another, each a trial.

    Attributes:
        trials: how many.
        metric: tag of the metric that decides, of the validation.
        direction: whether the largest or the smallest is best.
        sampler: random, or Optuna's tree-structured Parzen estimator.
        pruner: which trials are given up early: none, those below the median, or by successive halving in brackets.
        seed: of what is drawn.
        startup: trials that come before the Parzen estimator and the median count.
    """

    trials: int
    metric: str
    direction: Direction
    sampler: Sampler = "tpe"
    pruner: Pruner = "none"
    seed: int = 0
    startup: int = 5


def read_search(given: Any, axes: Sequence[Axis], exclude: Sequence[Mapping[str, str]]) -> Search | None:
    """The search that a file describes, None where it describes none; ConfigError for what is none.

    Args:
        given: what stands under `search`.
        axes: of the study.
        exclude: labels by axis of what is left out.
    """
    if given is None:
        ranged = next((axis.name for axis in axes if axis.range is not None), None)
        if ranged is not None:
            raise ConfigError(
                f"axes.{ranged}.range: numbers are drawn from a range by a search, and the study has none; expected "
                "`search`, such as {trials: 24, metric: val/exact, direction: max}, or `values` in place of `range`"
            )
        return None
    content = require_mapping("search", given, ", ".join(SEARCH_KEYS))
    require_known("search.", content, SEARCH_KEYS)
    if not axes:
        raise ConfigError("search: the study has no axes; expected at least one")
    metric = content.get("metric")
    if not isinstance(metric, str) or not metric.startswith("val/") or metric == "val/":
        raise ConfigError(
            f"search.metric: {metric!r}; expected the tag of a metric of the validation, such as val/loss"
        )
    direction = _one_of("direction", content.get("direction"), get_args(Direction))
    sampler = _one_of("sampler", content.get("sampler", Search.sampler), get_args(Sampler))
    pruner = _one_of("pruner", content.get("pruner", Search.pruner), get_args(Pruner))
    trials = _number("trials", content.get("trials"), 1)
    seed = _number("seed", content.get("seed", Search.seed), 0)
    startup = _number("startup", content.get("startup", Search.startup), 0)
    size = space_size(axes, exclude)
    if size is not None and trials > size:
        raise ConfigError(
            f"search.trials: {trials}; the axes have {size} cells; expected at most as many, or no search: then all "
            "of them are run"
        )
    return Search(trials, metric, direction, sampler, pruner, seed, startup)  # type: ignore[arg-type]


def space_size(axes: Sequence[Axis], exclude: Sequence[Mapping[str, str]]) -> int | None:
    """How many cells there are to choose from; None where that is not counted: in some ranges, or with much excluded.

    exclude: entries with labels of axes without a range.
    """
    ranges = [axis.range.count for axis in axes if axis.range is not None]
    if None in ranges:
        return None
    labels = {axis.name: list(axis.values) for axis in axes if axis.range is None}
    named = {name: own for name, own in labels.items() if any(name in entry for entry in exclude)}
    if math.prod(len(own) for own in named.values()) > _MOST_COUNTED:
        return None
    cells = (dict(zip(named, chosen, strict=True)) for chosen in itertools.product(*named.values()))
    left = sum(not is_excluded(cell, exclude) for cell in cells)
    free = (len(own) for name, own in labels.items() if name not in named)
    return left * math.prod(free) * math.prod(count for count in ranges if count is not None)


def telling_labels(
    labels: Mapping[str, Sequence[str]], exclude: Sequence[Mapping[str, str]], baseline: Mapping[str, str]
) -> list[dict[str, str]]:
    """One cell that has the baseline's labels, and for each other label one with it, of which the rest is the same.

    Where that is excluded, further labels differ from the first cell's. A label that all exclude is in none.

    Args:
        labels: by axis; there may be more cells than can be counted.
        exclude: labels by axis of what is left out.
        baseline: labels by axis, of some axes.

    Returns:
        Labels by axis, in the order of the axes; nothing if the baseline is excluded.
    """
    first = _allowed(labels, exclude, baseline, {})
    if first is None:
        return []
    found = [first]
    for name, own in labels.items():
        for label in own:
            cell = _allowed(labels, exclude, {name: label}, first)
            if cell is not None and not any(label == known[name] for known in found):
                found.append(cell)
    return found


def _allowed(
    labels: Mapping[str, Sequence[str]],
    exclude: Sequence[Mapping[str, str]],
    fixed: Mapping[str, str],
    liked: Mapping[str, str],
) -> dict[str, str] | None:
    """A cell that is not excluded, has what is fixed, and what is liked where it can."""
    # What no entry names cannot be at fault: only the rest is tried in every way.
    named = [name for name in labels if name not in fixed and any(name in entry for entry in exclude)]

    def tried(chosen: dict[str, str], count: int) -> dict[str, str] | None:
        if is_excluded(chosen, exclude):
            return None
        if count == len(named):
            return chosen
        name = named[count]
        for label in sorted(labels[name], key=lambda label: label != liked.get(name)):
            found = tried({**chosen, name: label}, count + 1)
            if found is not None:
                return found
        return None

    found = tried(dict(fixed), 0)
    if found is None:
        return None
    return {name: found.get(name, liked.get(name, own[0])) for name, own in labels.items()}


def _one_of(key: str, given: Any, known: Sequence[str]) -> str:
    if given not in known:
        raise ConfigError(f"search.{key}: {given!r}; expected one of {', '.join(known)}")
    return str(given)


def _number(key: str, given: Any, least: int) -> int:
    if isinstance(given, bool) or not isinstance(given, int) or not least <= given < 2**32:
        raise ConfigError(f"search.{key}: {given!r}; expected a whole number of at least {least}")
    return given
