"""Verdicts on claims, each with the interval that decides it: supported, not supported, or undecided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hybridvl.ablation.claims import GROWTH, Claim, Part
from hybridvl.ablation.report.cells import Cell, Settings, find_cell
from hybridvl.ablation.report.costs import Costs
from hybridvl.ablation.report.guessing import guessing
from hybridvl.ablation.report.metrics import chosen_metrics
from hybridvl.ablation.report.runs import Run
from hybridvl.ablation.statistics import Interval, mean_interval, paired_difference
from hybridvl.layers.errors import ConfigError, within
from hybridvl.plan.units import tokens

SUPPORTED, NOT_SUPPORTED, UNDECIDED = "supported", "not supported", "undecided"


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


def judge(
    claims: Sequence[Claim],
    runs: Sequence[Run],
    cells: Sequence[Cell],
    costs: Sequence[Costs],
    settings: Settings,
    unfinished: bool = False,
) -> list[Judged]:
    """What the runs say about every claim.

    A part is supported when its whole interval is in the range that is claimed, not supported when no point of it is,
    and otherwise undecided, as it is without an interval. What cannot vary, as bytes of state, is its own interval.

    unfinished: whether cells and metrics that are not there may still come; what is said about them is undecided.

    Raises:
        ConfigError: a cell that is not there, a metric that no run logged.
    """
    found = []
    for number, claim in enumerate(claims):
        findings = []
        for part in claim.parts:
            try:
                with within("" if unfinished else f"claims[{number}]"):
                    findings.append(_find(part, runs, cells, costs, settings))
            except ConfigError as error:
                if not unfinished:
                    raise
                findings.append(_decided(part, part.metric, None, str(error)))
        found.append(Judged(claim.text, tuple(findings)))
    return found


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
