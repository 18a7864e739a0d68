"""The report as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from hybridvl.ablation.report import tables
from hybridvl.ablation.report.analysis import Analysis
from hybridvl.ablation.report.figures import Picture
from hybridvl.ablation.report.metrics import is_cost
from hybridvl.ablation.report.wording import counted


def markdown(analysis: Analysis, pictures: Sequence[Picture]) -> str:
    """The whole report, with links to the pictures beside it."""
    parts = ["# Report", f"{tables.headline(analysis)}.", tables.method(analysis)]
    if analysis.claims:
        parts += ["## Claims", tables.CLAIM_SENTENCE, _claims(analysis)]
    for name in analysis.metrics:
        better = " (lower is better)" if is_cost(name) else ""
        parts += [f"## {name}{better}", _table(*tables.metric_table(analysis, name))]
        parts += [f"![{picture.shows}]({picture.name})" for picture in pictures if picture.metric == name]
    parts += ["## Costs", tables.cost_sentence(analysis), _table(tables.COST_HEAD, tables.cost_rows(analysis))]
    parts += [_table(*table) for table in tables.length_tables(analysis)]
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


def _claims(analysis: Analysis) -> str:
    lines = []
    for name, claimed, found, over, verdict in tables.claim_rows(analysis):
        about = f" ({_escaped(over)})" if over else ""
        said = f"{_escaped(name)} is {found}{about}; claimed: {claimed}" if claimed else f"**{_escaped(name)}**"
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
