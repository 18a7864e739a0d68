"""Claims about cells, each with the interval that decides it: supported, not supported, or undecided."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybridvl.ablation.report.cells import Cell, Settings, find_cell
from hybridvl.ablation.report.costs import Costs
from hybridvl.ablation.report.guessing import guessing
from hybridvl.ablation.report.labels import text
from hybridvl.ablation.report.metrics import chosen_metrics
from hybridvl.ablation.report.runs import Run
from hybridvl.ablation.statistics import Interval, mean_interval, paired_difference
from hybridvl.layers.errors import ConfigError, within
from hybridvl.pipeline.mappings import require_known, require_mapping
from hybridvl.plan.units import tokens

SUPPORTED, NOT_SUPPORTED, UNDECIDED = "supported", "not supported", "undecided"
GROWTH = ("growth/state_bytes", "growth/decode_seconds")
_PART_KEYS = ("cell", "than", "metric", "chance", "above", "below", "between")
_BOUNDS = "above: NUMBER, below: NUMBER or between: [LOW, HIGH]"


@dataclass(frozen=True)
class Part:
    """A quantity and the range that it is said to be in.

    Attributes:
        cell: labels of the one cell that it is of.
        metric: a logged one, or one of `GROWTH`: the cost after the most tokens over that after the fewest.
        low, high: ends of the range, infinite where it is open.
        than: labels of another cell, whose metric is taken off, seed by seed.
        chance: whether what guessing gets is taken off.
    """

    cell: Mapping[str, str]
    metric: str
    low: float
    high: float
    than: Mapping[str, str] | None = None
    chance: bool = False

    @property
    def claimed(self) -> str:
        """The range, for people."""
        if math.isinf(self.low):
            return f"below {self.high:g}"
        return f"above {self.low:g}" if math.isinf(self.high) else f"between {self.low:g} and {self.high:g}"


@dataclass(frozen=True)
class Claim:
    """A sentence, and what must all be so for it to be supported."""

    text: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Finding:
    """What was found about a part: the quantity in words, its interval, and the verdict with its reason, if any."""

    quantity: str
    claimed: str
    interval: Interval
    verdict: str
    reason: str = ""


@dataclass(frozen=True)
class Judged:
    """A claim with the findings about its parts."""

    text: str
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> str:
        """Supported if every part is, not supported if any part is not."""
        verdicts = [finding.verdict for finding in self.findings]
        if NOT_SUPPORTED in verdicts:
            return NOT_SUPPORTED
        return SUPPORTED if all(verdict == SUPPORTED for verdict in verdicts) else UNDECIDED


def read_claims(given: Any) -> list[Claim]:
    """Claims from what a YAML file holds under `claims`: a list of {claim: TEXT, parts: [...]}, or of a claim's text
    and one part in one mapping.

    Raises:
        ConfigError: naming the place, what stands there and what is accepted.
    """
    if not isinstance(given, list) or not given:
        raise ConfigError(f"claims: {given!r}; expected a list of claims")
    found = []
    for number, entry in enumerate(given):
        place = f"claims[{number}]"
        values = require_mapping(place, entry, "claim and parts")
        require_known(f"{place}.", values, ("claim", "parts", *_PART_KEYS))
        said = values.get("claim")
        if not isinstance(said, str) or not said:
            raise ConfigError(f"{place}.claim: {said!r}; expected a sentence")
        parts = values.get("parts", [{key: value for key, value in values.items() if key != "claim"}])
        if not isinstance(parts, list) or not parts or ("parts" in values and len(values) > 2):
            raise ConfigError(f"{place}.parts: {parts!r}; expected a list of parts, or one part beside the claim")
        places = [f"{place}.parts[{index}]" if "parts" in values else place for index in range(len(parts))]
        found.append(Claim(said, tuple(map(_part, places, parts))))
    return found


def judge(
    claims: Sequence[Claim], runs: Sequence[Run], cells: Sequence[Cell], costs: Sequence[Costs], settings: Settings
) -> list[Judged]:
    """What the runs say about every claim.

    A part is supported when its whole interval is in the range that is claimed, not supported when no point of it is,
    and otherwise undecided, as it is without an interval. What cannot vary, as bytes of state, is its own interval.

    Raises:
        ConfigError: a cell that is not there, a metric that no run logged.
    """
    found = []
    for number, claim in enumerate(claims):
        with within(f"claims[{number}]"):
            found.append(Judged(claim.text, tuple(_find(part, runs, cells, costs, settings) for part in claim.parts)))
    return found


def _part(place: str, given: Any) -> Part:
    values = require_mapping(place, given, f"cell, metric and {_BOUNDS}")
    require_known(f"{place}.", values, _PART_KEYS)
    metric = values.get("metric")
    if not isinstance(metric, str) or not metric:
        raise ConfigError(f"{place}.metric: {metric!r}; expected the tag of a metric, or {' or '.join(GROWTH)}")
    chance = values.get("chance", False)
    if not isinstance(chance, bool) or (chance and (values.get("than") is not None or metric in GROWTH)):
        raise ConfigError(
            f"{place}.chance: {chance!r}; expected true or false, and true only for the metric of one cell"
        )
    bounds = [key for key in ("above", "below", "between") if key in values]
    if len(bounds) != 1:
        raise ConfigError(f"{place}: {', '.join(bounds) or 'no range'}; expected one of {_BOUNDS}")
    value = values[bounds[0]]
    ends = value if bounds[0] == "between" else [value, value]
    if not isinstance(ends, list) or len(ends) != 2 or not all(map(_is_number, ends)) or ends[0] > ends[1]:
        raise ConfigError(f"{place}.{bounds[0]}: {value!r}; expected {_BOUNDS}")
    low, high = -math.inf if bounds == ["below"] else ends[0], math.inf if bounds == ["above"] else ends[1]
    than = values.get("than")
    return Part(
        cell=_labels(f"{place}.cell", values.get("cell")),
        metric=metric,
        low=float(low),
        high=float(high),
        than=None if than is None else _labels(f"{place}.than", than),
        chance=chance,
    )


def _find(
    part: Part, runs: Sequence[Run], cells: Sequence[Cell], costs: Sequence[Costs], settings: Settings
) -> Finding:
    index = find_cell(cells, part.cell)
    other = None if part.than is None else find_cell(cells, part.than)
    words = f"{part.metric} of {cells[index].name}" + ("" if other is None else f" minus that of {cells[other].name}")
    if part.metric in GROWTH:
        if other is not None:
            raise ConfigError(f"than: {dict(part.than or {})}; {part.metric} is of one cell")
        growth, lengths = _growth(costs[index], part.metric, settings)
        if lengths:
            words += f", from {tokens(min(lengths))} to {tokens(max(lengths))} tokens"
        missing = "the model is not known" if part.metric == GROWTH[0] else "not measured, see --latency"
        return _decided(part, words, growth, missing)
    if not any(run.metrics for run in runs):
        return _decided(part, words, None, "no run has logged a metric yet")
    chosen_metrics(runs, [part.metric])
    values = cells[index].values(part.metric)
    if other is not None:
        pairs = paired_difference(values, cells[other].values(part.metric), settings.interval, settings.level)
        return _decided(part, words, pairs.interval, "fewer than two pairs of seeds are done")
    if part.chance:
        chance = guessing([cells[index]], [part.metric]).get(part.metric)
        if chance is None:
            return _decided(part, f"{words} minus guessing", None, "it is not known how far guessing gets")
        words += f" minus guessing ({chance:.3g})"
        values = {seed: value - chance for seed, value in values.items()}
    interval = mean_interval(list(values.values()), settings.interval, settings.level)
    return _decided(part, words, interval, "fewer than two seeds are done")


def _decided(part: Part, quantity: str, interval: Interval | None, missing: str) -> Finding:
    if interval is None or math.isnan(interval.low):
        shown = interval or Interval(math.nan, math.nan, math.nan, math.nan, 0)
        return Finding(quantity, part.claimed, shown, UNDECIDED, missing)
    verdict = UNDECIDED
    if part.low <= interval.low and interval.high <= part.high:
        verdict = SUPPORTED
    elif interval.high < part.low or part.high < interval.low:
        verdict = NOT_SUPPORTED
    return Finding(quantity, part.claimed, interval, verdict)


def _growth(cost: Costs, metric: str, settings: Settings) -> tuple[Interval | None, list[int]]:
    """The ratio of a cost after the most tokens to that after the fewest, and the numbers of tokens."""
    if metric == GROWTH[1]:
        ratios = cost.latency_growth
        return mean_interval(ratios, settings.interval, settings.level) if ratios else None, [*cost.latency]
    if not cost.growth:
        return None, []
    ratio = cost.growth[max(cost.growth)] / cost.growth[min(cost.growth)]
    return Interval(ratio, ratio, ratio, 0.0, 1), [*cost.growth]


def _labels(place: str, given: Any) -> dict[str, str]:
    labels = require_mapping(place, given, "labels to values")
    return {str(key): text(value) for key, value in labels.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
