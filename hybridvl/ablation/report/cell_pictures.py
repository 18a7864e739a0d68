"""Pictures with a row for each cell: a metric with intervals and single seeds, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hybridvl.ablation.report.analysis import Analysis
from hybridvl.ablation.report.guessing import guessing
from hybridvl.ablation.report.metrics import direction, is_share, metric_label
from hybridvl.ablation.report.naming import cell_names, shared_labels, shown_cells
from hybridvl.ablation.report.style import COLOURS, limits, tidy, title
from hybridvl.ablation.report.wording import probability, with_interval
from hybridvl.ablation.statistics import Interval
from hybridvl.pictures import FAINT, INK, figure, plain

_ROWS = 40  # cells in a picture that has a row for each
_SIGNIFICANT = 0.05

_RING: dict[str, Any] = {"markersize": 4.5, "markerfacecolor": "white", "markeredgecolor": FAINT, "zorder": 4}


def draw_cells(analysis: Analysis, metric: str) -> Figure | None:
    """A row for each cell: its seeds as rings, their mean as a dot, the interval as a bar; None if no cell has it."""
    indices, only = shown_cells(analysis, metric, _ROWS)
    if not indices:
        return None
    results = [analysis.results[metric][index] for index in indices]
    made, axes, heading = _rows(analysis, indices)
    for row, result in enumerate(results):
        _marks(axes, row, result.interval, [*result.values.values()], COLOURS[0])
    baselines = {there for there in analysis.baselines if there is not None}
    if len(baselines) == 1:
        mean = analysis.results[metric][min(baselines)].interval.mean
        axes.axvline(mean, color=FAINT, linestyle="--", linewidth=1, zorder=1)
    values = [value for result in results for value in result.values.values()]
    ends = [end for result in results for end in (result.interval.low, result.interval.high)]
    chance = guessing([analysis.cells[index] for index in indices], [metric]).get(metric)
    if chance is not None:
        axes.axvline(chance, color=COLOURS[1], linestyle=":", linewidth=1.2, zorder=1)
        values.append(chance)
    axes.set_xlim(*limits(values, ends, is_share(metric)))
    _right_texts(axes, [with_interval(result.interval) for result in results])
    axes.set_xlabel(plain(metric_label(metric)), color=INK, fontsize=9.5)
    how = f"dot: mean of seeds; rings: seeds; bar: {analysis.settings.percent} interval"
    if len(baselines) == 1:
        how += "; dashed: the baseline's mean"
    how += "; dotted: guessing" if chance is not None else ""
    how += shared_labels(analysis, indices)
    title(made, f"{metric} by {heading}", how, only)
    return made


def draw_differences(analysis: Analysis, metric: str) -> Figure | None:
    """A row for each cell that has a baseline: the mean of its paired differences, interval and pairs; None if none."""
    shown, only = shown_cells(analysis, metric, _ROWS)
    rows = []
    for index in shown:
        result = analysis.results[metric][index]
        if result.difference is not None and result.difference.pairs:
            rows.append((index, result.difference, result.p_corrected))
    if not rows:
        return None
    made, axes, _ = _rows(analysis, [index for index, _, _ in rows])
    axes.axvline(0, color=INK, linewidth=1)
    texts, values, ends = [], [0.0], []
    better = direction(metric)
    for row, (_, difference, p) in enumerate(rows):
        interval = difference.interval
        told = COLOURS[0] if not better else COLOURS[2] if better * interval.mean > 0 else COLOURS[1]
        colour = told if p < _SIGNIFICANT else FAINT
        _marks(axes, row, interval, difference.differences, colour)
        texts.append(with_interval(interval, "+") + _p_text(p))
        values += difference.differences
        ends += [interval.low, interval.high]
    axes.set_xlim(*limits(values, ends, share=False))
    _right_texts(axes, texts)
    baseline = analysis.baseline_name
    axes.set_xlabel(plain(f"{metric}, minus that of {baseline}"), color=INK, fontsize=9.5)
    clear = "green better, red worse" if better else "blue different"
    how = f"rings: pairs of one seed; bar: {analysis.settings.percent} interval; "
    how += f"{clear} (p < {_SIGNIFICANT} by Holm), grey unclear"
    how += shared_labels(analysis, [index for index, _, _ in rows])
    title(made, f"Differences of {metric} to {baseline}", how, only)
    return made


def _p_text(p: float) -> str:
    said = probability(p)
    return "" if math.isnan(p) else f"  p {said}" if said.startswith("<") else f"  p = {said}"


def _rows(analysis: Analysis, indices: list[int]) -> tuple[Figure, Axes, str]:
    """A figure with a row for each cell, the first on top."""
    heading, names = cell_names(analysis, indices)
    lines = sum(max(1, name.count("\n") + 1) for name in names)
    longest = max(len(line) for name in names for line in name.split("\n"))
    made = figure(min(12.5, 7.6 + 0.07 * longest), 1.7 + 0.34 * len(names) + 0.13 * (lines - len(names)))
    axes = made.subplots()
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    tidy(axes, grid="x")
    if heading:
        axes.set_ylabel(plain(heading), color=INK, fontsize=9.5)
    return made, axes, heading or "cell"


def _marks(axes: Axes, row: int, interval: Interval, singles: Sequence[float], colour: str) -> None:
    """A row's interval as a bar, its mean as a dot, and below them single values as rings."""
    axes.plot([interval.low, interval.high], [row, row], color=colour, linewidth=2.2, solid_capstyle="round")
    axes.plot([interval.mean], [row], "o", color=colour, markersize=7, zorder=3)
    for place, value in enumerate(singles):
        axes.plot([value], [row + 0.22 + 0.05 * (place % 3)], "o", **_RING)


def _right_texts(axes: Axes, texts: list[str]) -> None:
    """The figures of each row, at its end."""
    for row, text in enumerate(texts):
        axes.annotate(
            plain(text),
            (1.01, row),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
            color=INK,
            annotation_clip=False,
        )
