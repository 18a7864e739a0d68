"""The report as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from hybridvl.ablation.report.analysis import Analysis
from hybridvl.ablation.report.figures import Picture
from hybridvl.ablation.report.metrics import is_cost
from hybridvl.ablation.report.wording import UNKNOWN, counted, headline, method, number, probability, with_interval
from hybridvl.plan.units import tokens, with_prefix

CLAIM_HEAD = ("claim, and what it rests on", "claimed", "found", "verdict")
CLAIM_SENTENCE = (
    "A part is supported when its whole interval is in the range that is claimed, not supported when no point of it is "
    "there, else undecided; a claim is supported when all of its parts are, and not supported when one of them is not."
)
COST_HEAD = ("cell", "parameters", "FLOPs per token", "FLOPs of a decode step", "state", "decode step")


def markdown(analysis: Analysis, pictures: Sequence[Picture]) -> str:
    """The whole report, with links to the pictures beside it."""
    parts = ["# Report", f"{headline(analysis)}.", method(analysis)]
    if analysis.claims:
        parts += ["## Claims", CLAIM_SENTENCE, _claims(analysis)]
    for name in analysis.metrics:
        better = " (lower is better)" if is_cost(name) else ""
        parts += [f"## {name}{better}", _table(*metric_table(analysis, name))]
        parts += [f"![{picture.shows}]({picture.name})" for picture in pictures if picture.metric == name]
    parts += ["## Costs", cost_sentence(analysis), _table(COST_HEAD, cost_rows(analysis))]
    parts += [f"![{picture.shows}]({picture.name})" for picture in pictures if not picture.metric]
    if analysis.left_out:
        parts.append(f"## {counted(len(analysis.left_out), 'run')} that no mean is taken over")
        rows = [(run.name, "" if run.seed is None else str(run.seed), why) for run, why in analysis.left_out]
        parts.append(_table(("run", "seed", "why"), rows))
    if analysis.notes:
        parts += ["## Notes", _list(analysis.notes)]
    if analysis.warnings:
        parts += ["## Warnings", _list(analysis.warnings)]
    parts.append(
        f"All {len(analysis.logged)} metrics: of every run in report.csv, of every cell with intervals in cells.csv, "
        "both in report.json and report.html."
    )
    return "\n\n".join(parts) + "\n"


def claim_rows(analysis: Analysis) -> list[tuple[str, ...]]:
    """Rows of `CLAIM_HEAD`: one for each claim, and after it one for each of its parts."""
    rows: list[tuple[str, ...]] = []
    for claim in analysis.claims:
        rows.append((claim.text, "", "", claim.verdict))
        for finding in claim.findings:
            shown = with_interval(finding.interval) + (f", {finding.reason}" if finding.reason else "")
            rows.append((finding.quantity, finding.claimed, shown, finding.verdict))
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
        rows.append([*row, *([difference, probability(result.p_corrected)] if compared else [])])
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


def cost_sentence(analysis: Analysis) -> str:
    """What the costs are counted for."""
    context = tokens(analysis.costs[0].context) if analysis.costs else UNKNOWN
    timed = [max(cost.latency) for cost in analysis.costs if cost.latency]
    after = f" The decode step was timed after {tokens(timed[0])} tokens, on the CPU in float32." if timed else ""
    return (
        f"Counted from the models' configurations for {context} tokens: forward FLOPs of the decoder and its head per "
        f"token of one pass, and of one more token after it; the state of one row, in the recipe's dtype.{after}"
    )


def _claims(analysis: Analysis) -> str:
    lines = []
    for name, claimed, found, verdict in claim_rows(analysis):
        said = f"{_escaped(name)} is {_escaped(found)}; claimed: {claimed}" if claimed else f"**{_escaped(name)}**"
        lines.append(f"{'    ' if claimed else ''}- {verdict}: {said}")
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_escaped(entry) for entry in line) + " |" for line in lines)


def _list(entries: Sequence[str]) -> str:
    return "\n".join(f"- {_escaped(entry)}" for entry in entries)


def _escaped(text: str) -> str:
    """Text whose stars, bars and line ends Markdown leaves alone."""
    for mark in ("\\", "|", "*", "_", "<", "`"):
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split()) if "\n" in text else text
