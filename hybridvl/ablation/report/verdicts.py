"""Verdicts on claims, each with the interval that decides it: supported, not supported, or undecided."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hybridvl.ablation.claims import GROWTH, Claim, Part
from hybridvl.ablation.report.cells import CellRuns, Settings, find_cell
from hybridvl.ablation.report.costs import CellCosts
from hybridvl.ablation.report.guessing import guessing, questions
from hybridvl.ablation.report.metrics import chosen_metrics, is_share
from hybridvl.ablation.report.runs import DONE, RunFolder
from hybridvl.ablation.report.wording import counted
from hybridvl.ablation.statistics import Interval, mean_interval, paired_difference, share_interval
from hybridvl.layers.errors import ConfigError, within
from hybridvl.plan.units import tokens

SUPPORTED, NOT_SUPPORTED, UNDECIDED = "supported", "not supported", "undecided"
FEWEST = 3
"""Seeds, or pairs of seeds, without which nothing is decided: two may be close to each other by chance."""
_NOTHING = mean_interval([])


@dataclass(frozen=True)
class Finding:
    """What was found about a part of a claim.

    Attributes:
        quantity: what was looked at, in words.
        claimed: the range that it is said to be in, in words.
        interval: that decides; all NaN where there is none.
        verdict: one of the three.
        basis: what the interval is of, such as "3 seeds".
        reason: why there is no verdict, where it is not that the interval reaches beyond an end of the range.
        mistake: whether the claim names a cell or a metric that is not there.
    """

    quantity: str
    claimed: str
    interval: Interval
    verdict: str
    basis: str = ""
    reason: str = ""
    mistake: bool = False


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


@dataclass(frozen=True)
class _Evidence:
    """An interval and what it is of; or, in `reason`, why there is none."""

    interval: Interval | None
    basis: str = ""
    reason: str = ""


def judge(
    claims: Sequence[Claim],
    runs: Sequence[RunFolder],
    cells: Sequence[CellRuns],
    costs: Sequence[CellCosts],
    settings: Settings,
    unfinished: bool = False,
) -> list[Judged]:
    """What the runs say about every claim.

    A part is supported when its whole interval is in the range that is claimed, not supported when no point of it is,
    and otherwise undecided, as it is with fewer than `FEWEST` seeds and where seeds show no spread. What cannot vary,
    as bytes of state, is its own interval.

    unfinished: whether cells and metrics that are not there may still come: what is said about them is a mistake in the
        finding, undecided, and not an error.

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
                findings.append(Finding(part.metric, part.claimed, _NOTHING, UNDECIDED, "", str(error), mistake=True))
        found.append(Judged(claim.text, tuple(findings)))
    return found


def _find(
    part: Part, runs: Sequence[RunFolder], cells: Sequence[CellRuns], costs: Sequence[CellCosts], settings: Settings
) -> Finding:
    cell = cells[index := find_cell(cells, part.cell)]
    other = None if part.than is None else cells[find_cell(cells, part.than)]
    words = f"{part.metric} of {cell.name}" + ("" if other is None else f" minus that of {other.name}")
    if part.metric in GROWTH:
        words, evidence = _growth(costs[index], part, words, settings)
    elif not any(run.metrics for run in runs):
        evidence = _Evidence(None, reason="no run has logged a metric yet")
    else:
        chosen_metrics(runs, [part.metric])
        if other is not None:
            evidence = _difference(cell, other, part.metric, settings)
        else:
            evidence = _mean(cell, part.metric, settings)
    if part.chance and evidence.interval is not None:
        chance = guessing([cell], [part.metric]).get(part.metric)
        words += " minus guessing" + ("" if chance is None else f" ({chance:.3g})")
        evidence = _beyond(evidence, chance)
    interval = evidence.interval or _NOTHING
    verdict = UNDECIDED if evidence.reason else _verdict(part, interval)
    return Finding(words, part.claimed, interval, verdict, evidence.basis, evidence.reason)


def _verdict(part: Part, interval: Interval) -> str:
    if part.low <= interval.low and interval.high <= part.high:
        return SUPPORTED
    return NOT_SUPPORTED if interval.high < part.low or part.high < interval.low else UNDECIDED


def _mean(cell: CellRuns, metric: str, settings: Settings) -> _Evidence:
    """The mean over seeds."""
    values = list(cell.values(metric).values())
    interval = mean_interval(values, settings.interval, settings.level)
    if len(values) < FEWEST:
        return _Evidence(interval, counted(len(values), "seed"), _too_few([cell], metric))
    basis = _seeds(cell, len(values))
    if interval.deviation == 0:
        exact = _of_one_run(cell, metric, interval.mean, settings)
        if exact is None:
            return _Evidence(interval, basis, f"no spread: all seeds came to {interval.mean:.4g}")
        return _Evidence(exact[0], f"{basis}, all the same: the exact interval of the {exact[1]:,} answers of one")
    return _Evidence(interval, basis)


def _difference(cell: CellRuns, other: CellRuns, metric: str, settings: Settings) -> _Evidence:
    """The mean of differences of equal seeds."""
    found = paired_difference(cell.seeded(metric), other.seeded(metric), settings.interval, settings.level)
    interval, basis = found.interval, f"{counted(len(found.pairs), 'pair')} of seeds"
    if len(found.pairs) < FEWEST:
        return _Evidence(interval, basis, _too_few([cell, other], metric))
    if lost := _lost([cell, other]):
        basis += f" of {len(cell.runs)} and {len(other.runs)} runs: {lost}"
    if interval.deviation == 0:
        both = [_same(one, metric, found.pairs, settings) for one in (cell, other)]
        if both[0] is None or both[1] is None:
            return _Evidence(interval, basis, f"no spread: all pairs differ by {interval.mean:.4g}")
        low, high = both[0].low - both[1].high, both[0].high - both[1].low
        wide = Interval(interval.mean, low, high, 0.0, interval.count)
        return _Evidence(wide, f"{basis}, all the same: from the exact intervals of the answers of one run each")
    return _Evidence(interval, basis)


def _same(cell: CellRuns, metric: str, seeds: Sequence[int], settings: Settings) -> Interval | None:
    """The exact interval of a cell whose seeds all came to the same."""
    values = cell.values(metric)
    interval = mean_interval([values[seed] for seed in seeds])
    exact = _of_one_run(cell, metric, interval.mean, settings) if interval.deviation == 0 else None
    return None if exact is None else exact[0]


def _of_one_run(cell: CellRuns, metric: str, share: float, settings: Settings) -> tuple[Interval, int] | None:
    """The exact interval of a share, and of how many answers; None where that is not known."""
    count = questions(cell, metric) if is_share(metric) else None
    return None if not count else (share_interval(share, count, settings.level), count)


def _beyond(evidence: _Evidence, chance: float | None) -> _Evidence:
    """The same minus what guessing gets."""
    if evidence.interval is None or chance is None:
        return _Evidence(None, evidence.basis, evidence.reason or "how far guessing gets is not known of this metric")
    found = evidence.interval
    ends = (found.mean - chance, found.low - chance, found.high - chance)
    return _Evidence(Interval(*ends, found.deviation, found.count), evidence.basis, evidence.reason)


def _seeds(cell: CellRuns, count: int) -> str:
    """ "3 seeds", "2 seeds of 5 runs: 2 failed, 1 killed"."""
    said = counted(count, "seed")
    lost = _lost([cell])
    return f"{said} of {counted(len(cell.runs), 'run')}: {lost}" if lost else said


def _lost(cells: Sequence[CellRuns]) -> str:
    ended = Counter(run.status for cell in cells for run in cell.runs if run.status != DONE)
    return ", ".join(f"{count} {status}" for status, count in sorted(ended.items()))


def _too_few(cells: Sequence[CellRuns], metric: str) -> str:
    """Why there are too few seeds to decide."""
    what = "seeds" if len(cells) == 1 else "seeds of both cells"
    said = f"expected at least {FEWEST} {what}"
    for cell in cells:
        done = sum(run.status == DONE for run in cell.runs)
        place = "" if len(cells) == 1 else f" of {cell.name}"
        if done < FEWEST:
            lost = _lost([cell])
            said += f"; {done} of {counted(len(cell.runs), 'run')}{place} {'is' if done == 1 else 'are'} done"
            said += f", {lost}" if lost else ""
        elif len(cell.values(metric)) < FEWEST:
            said += f"; {len(cell.values(metric))} of the runs{place} that are done logged it"
    return said


def _growth(cost: CellCosts, part: Part, words: str, settings: Settings) -> tuple[str, _Evidence]:
    """The ratio of a cost after many tokens to that after few, and the words for it."""
    timed = part.metric == GROWTH[1]
    known: Mapping[int, object] = cost.latency_blocks if timed else cost.growth
    if not cost.growth:
        return words, _Evidence(None, reason="the model is not known")
    few, many = part.tokens or (min(known, default=0), max(known, default=0))
    if few == many or few not in known or many not in known:
        said = " and ".join(map(tokens, sorted(known)))
        lengths = "two numbers of tokens, such as 128 8192" if part.tokens is None else f"{few} {many}"
        measured = f"measured after {said} tokens alone" if said else "not measured"
        return words, _Evidence(None, reason=f"{measured}; expected --latency with {lengths}")
    words += f", from {tokens(few)} to {tokens(many)} tokens"
    if not timed:
        ratio = cost.growth[many] / cost.growth[few]
        return words, _Evidence(Interval(ratio, ratio, ratio, 0.0, 1), "counted, exact")
    ratios = [b / a for a, b in zip(cost.latency_blocks[few], cost.latency_blocks[many], strict=True)]
    basis = f"{len(ratios)} blocks of timings of one model here: what the machine's noise leaves open"
    return words, _Evidence(mean_interval(ratios, settings.interval, settings.level), basis)
