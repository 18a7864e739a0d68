"""The cells of a study as a table: what varies, what each costs, and how closely their budgets are matched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from hybridvl.ablation.matching import Matched
from hybridvl.ablation.report.wording import counted
from hybridvl.ablation.study import Study
from hybridvl.plan.units import tokens, with_prefix


def cell_rows(matched: Sequence[Matched]) -> list[dict[str, Any]]:
    """Plain values for JSON, a row for each cell: cell, labels, params, flops, state_bytes, context, dtype (None where
    costs are unknown), solved, residuals, unknown."""
    return [
        {
            "cell": entry.cell.name,
            "labels": entry.cell.labels,
            **{
                key: None if entry.costs is None else getattr(entry.costs, key)
                for key in ("params", "flops", "state_bytes", "context", "dtype")
            },
            "solved": entry.solved,
            "residuals": entry.residuals,
            "unknown": entry.unknown,
        }
        for entry in matched
    ]


def cell_table(
    study: Study, matched: Sequence[Matched], more: Mapping[str, Sequence[str]] | None = None, title: str = ""
) -> Table:
    """The same for a terminal.

    Args:
        study: the study.
        matched: its cells.
        more: further columns, a text for each cell by the column's heading.
        title: above the table; "": how many cells, seeds and runs there are.
    """
    more = more or {}
    count = len(matched) * len(study.seeds)
    title = title or (
        f"{study.name}: {counted(len(matched), 'cell')} x {counted(len(study.seeds), 'seed')} = {counted(count, 'run')}"
    )
    table = Table(title=escape(title), title_justify="left", box=box.ROUNDED, caption_justify="left")
    for axis in study.axes:
        table.add_column(escape(axis.name), overflow="fold")
    for heading in ("parameters", *_headings(matched)):
        table.add_column(heading, justify="right")
    solved = list(dict.fromkeys(path for entry in matched for path in entry.solved))
    for path in solved:
        table.add_column(f"{escape(path.rpartition('.')[2])}\nsolved", justify="right")
    for match in study.matches:
        table.add_column(f"{match.budget}\noff by", justify="right")
    for heading in more:
        table.add_column(escape(heading), justify="right")
    for number, entry in enumerate(matched):
        is_baseline = study.baseline.items() <= entry.cell.labels.items()
        table.add_row(
            *(escape(entry.cell.labels[axis.name]) for axis in study.axes),
            *_costs(entry),
            *(str(entry.solved.get(path, "")) for path in solved),
            *("baseline" if is_baseline else _share(entry.residuals.get(match.budget)) for match in study.matches),
            *(escape(column[number]) for column in more.values()),
        )
    unknown = list(dict.fromkeys(entry.unknown for entry in matched if entry.unknown))
    table.caption = escape("\n".join(unknown)) or None
    return table


def _headings(matched: Sequence[Matched]) -> tuple[str, str]:
    contexts = sorted({entry.costs.context for entry in matched if entry.costs is not None})
    at = f"\nat {' or '.join(map(tokens, contexts))}" if contexts else ""
    return f"FLOPs per token{at}", f"state{at}"


def _costs(entry: Matched) -> tuple[str, str, str]:
    costs = entry.costs
    if costs is None:
        return "?", "?", "?"
    return f"{costs.params:,}", with_prefix(costs.flops, ""), f"{costs.state_bytes:,} B"


def _share(residual: float | None) -> str:
    return "" if residual is None else f"{100 * residual:+.2f} %"
