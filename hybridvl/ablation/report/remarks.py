"""What a reader must know about the runs that means and differences are of."""

from __future__ import annotations

from collections.abc import Sequence

from hybridvl.ablation.report.cells import CellRuns
from hybridvl.ablation.report.labels import mixed

_SHOWN = 6  # settings that a line names


def unlike(cells: Sequence[CellRuns]) -> list[str]:
    """A line about each cell whose runs have equal labels and recipes that differ in more than their seed."""
    lines = []
    for cell in cells:
        runs = [run for run in cell.used.values() if run.labels]
        keys = mixed(runs) if len(runs) > 1 else []
        if keys:
            more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
            lines.append(f"{cell.name}: its runs have the same labels and differ in {', '.join(keys[:_SHOWN])}{more}")
    return lines


def unpaired(cells: Sequence[CellRuns]) -> list[str]:
    """A line about runs that are in no difference, as they do not say their seed; none if there are no such runs."""
    count = sum(seed < 0 for cell in cells for seed in cell.used)
    return [f"runs without seed_everything in their recipe are in no difference: {count}"] if count else []
