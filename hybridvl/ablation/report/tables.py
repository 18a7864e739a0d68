"""The tables of a report and the sentences beside them, as texts for the terminal, for Markdown and for the page."""

from __future__ import annotations

from hybridvl.ablation.report.analysis import Analysis
from hybridvl.ablation.report.verdicts import FEWEST
from hybridvl.ablation.report.wording import UNKNOWN, counted, number, probability, with_interval
from hybridvl.plan.units import tokens, with_prefix

CLAIM_HEAD = ("claim, and what it rests on", "claimed", "found", "over", "verdict")
CLAIM_SENTENCE = (
    "A part is supported when its whole interval is in the range that is claimed, not supported when no point of it is "
    f"there, else undecided, as it is with fewer than {FEWEST} seeds and without any spread; a claim "
    "is supported when all of its parts are, and not supported when one of them is not."
)
COST_HEAD = ("cell", "parameters", "FLOPs per token", "FLOPs of a decode step", "state", "decode step")


def headline(analysis: Analysis) -> str:
    """ "24 runs in 8 cells: 22 done, 2 failed"."""
    statuses = ", ".join(f"{count:,} {status}" for status, count in analysis.statuses.items())
    return f"{counted(len(analysis.runs), 'run')} in {counted(len(analysis.cells), 'cell')}: {statuses}"


def method(analysis: Analysis) -> str:
    """How intervals and tests were made, as sentences."""
    settings = analysis.settings
    how = "by Student's t" if settings.interval == "t" else "by the bootstrap (percentiles of 10,000 resamples)"
    said = f"Means over seeds with {settings.percent} intervals {how}."
    if analysis.baseline_name:
        test = "paired t test" if settings.interval == "t" else "sign-flip test"
        there = f"the cell with {analysis.baseline_name}" if settings.baseline else "the baseline of its study"
        said += (
            f" Differences are those of equal seeds, to {there} and otherwise the same labels; p is of the {test}, "
            "corrected by Holm over all comparisons of the metric."
        )
    return said


def claim_rows(analysis: Analysis) -> list[tuple[str, ...]]:
    """Rows of `CLAIM_HEAD`: one for each claim, and after it one for each of its parts."""
    rows: list[tuple[str, ...]] = []
    for claim in analysis.claims:
        rows.append((claim.text, "", "", "", claim.verdict))
        for finding in claim.findings:
            over = "; ".join(filter(None, (finding.basis, finding.reason)))
            rows.append((finding.quantity, finding.claimed, with_interval(finding.interval), over, finding.verdict))
    return rows


def metric_table(analysis: Analysis, metric: str) -> tuple[list[str], list[list[str]]]:
    """The head of a table of one metric, and a row for every cell: how many of its runs the mean is over, mean and
    interval; where there are baselines also the difference with its interval and p."""
    compared = any(index is not None for index in analysis.baselines)
    head = ["cell", "seeds", "mean", *(["difference to baseline", "p (Holm)"] if compared else [])]
    rows = []
    for index, (cell, result) in enumerate(zip(analysis.cells, analysis.results[metric], strict=True)):
        row = [cell.name, f"{len(result.values)} of {len(cell.runs)}", with_interval(result.interval)]
        apart = result.difference
        difference = "baseline" if index in analysis.baselines else UNKNOWN
        if apart is not None:
            few = apart.interval.count < len(result.values)
            pairs = f" ({counted(apart.interval.count, 'pair')})" if few else ""
            difference = with_interval(apart.interval, "+") + pairs
        p = "no spread" if apart is not None and apart.interval.deviation == 0 else probability(result.p_corrected)
        rows.append([*row, *([difference, p] if compared else [])])
    return head, rows


def cost_rows(analysis: Analysis) -> list[tuple[str, ...]]:
    """A row of `COST_HEAD` for every cell."""
    return [
        (
            cell.name,
            UNKNOWN if cost.parameters is None else f"{cost.parameters:,}",
            UNKNOWN if cost.flops is None else with_prefix(cost.flops, ""),
            UNKNOWN if cost.decode_flops is None else with_prefix(cost.decode_flops, ""),
            UNKNOWN if cost.state_bytes is None else with_prefix(cost.state_bytes, "B"),
            UNKNOWN if cost.decode_seconds is None else f"{number(1e3 * cost.decode_seconds)} ms",
        )
        for cell, cost in zip(analysis.cells, analysis.costs, strict=True)
    ]


def length_tables(analysis: Analysis) -> list[tuple[list[str], list[list[str]]]]:
    """Where decode steps were timed, the head of a table of state and time by tokens, and a row for every cell."""
    lengths = sorted({length for cost in analysis.costs for length in cost.latency})
    if not lengths:
        return []
    head = ["cell", *(f"{what} after {tokens(length)}" for what in ("state", "step") for length in lengths)]
    rows = []
    for cell, cost in zip(analysis.cells, analysis.costs, strict=True):
        states = (with_prefix(cost.growth[length], "B") if length in cost.growth else UNKNOWN for length in lengths)
        times = (cost.latency.get(length) for length in lengths)
        rows.append([cell.name, *states, *(UNKNOWN if time is None else f"{number(1e3 * time)} ms" for time in times)])
    return [(head, rows)]


def cost_sentence(analysis: Analysis) -> str:
    """What the costs are counted for."""
    context = tokens(analysis.costs[0].context) if analysis.costs else UNKNOWN
    timed = [max(cost.latency) for cost in analysis.costs if cost.latency]
    after = f" The decode step was timed after {tokens(timed[0])} tokens, on the CPU in float32." if timed else ""
    return (
        f"Counted from the models' configurations for {context} tokens: forward FLOPs of the decoder and its head per "
        f"token of one pass, and of one more token after it; the state of one row, in the recipe's dtype.{after}"
    )
