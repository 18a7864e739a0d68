"""What a search of a study is to do: how many trials, by which metric, drawn how, and given up when."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hybridvl.ablation.axes import Axis
from hybridvl.layers.errors import ConfigError
from hybridvl.pipeline.mappings import require_known, require_mapping

Sampler = Literal["random", "tpe"]
Pruner = Literal["none", "median", "hyperband"]
Direction = Literal["max", "min"]

SEARCH_KEYS = ("sampler", "trials", "metric", "direction", "pruner", "seed", "startup")
"""Keys of a search."""

_STARTUP = 5


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
    startup: int = _STARTUP


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
    """How many cells there are to choose from; None where a range has values that are not counted.

    exclude: entries with labels of axes without a range.
    """
    ranges = [axis.range.count for axis in axes if axis.range is not None]
    if None in ranges:
        return None
    labels = {axis.name: list(axis.values) for axis in axes if axis.range is None}
    cells = (dict(zip(labels, chosen, strict=True)) for chosen in itertools.product(*labels.values()))
    left = sum(not any(entry.items() <= cell.items() for entry in exclude) for cell in cells)
    return left * math.prod(count for count in ranges if count is not None)


def _one_of(key: str, given: Any, known: Sequence[str]) -> str:
    if given not in known:
        raise ConfigError(f"search.{key}: {given!r}; expected one of {', '.join(known)}")
    return str(given)


def _number(key: str, given: Any, least: int) -> int:
    if isinstance(given, bool) or not isinstance(given, int) or not least <= given < 2**32:
        raise ConfigError(f"search.{key}: {given!r}; expected a whole number of at least {least}")
    return given
