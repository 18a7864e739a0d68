"""Pictures of cells: a metric with intervals and single seeds, paired differences, quality against costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from hybridvl.ablation.report.analysis import Analysis
from hybridvl.ablation.report.guessing import guessing
from hybridvl.ablation.report.metrics import direction, is_cost, is_share, metric_label
from hybridvl.ablation.report.naming import cell_names, shown_cells
from hybridvl.ablation.report.style import (
    COLOURS,
    FAINT,
    INK,
    LINES,
    MARKERS,
    figure,
    limits,
    plain,
    tidy,
    title,
)
from hybridvl.ablation.report.wording import number, probability, with_interval
from hybridvl.ablation.statistics import Interval, pareto_front
from hybridvl.plan.units import parameters, tokens, with_prefix

_ROWS = 40  # cells in a picture that has a row for each
_SIGNIFICANT = 0.05


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
    how = f"dot: mean of seeds; rings: seeds; bar: {_level(analysis)}"
    if len(baselines) == 1:
        how += "; dashed: the baseline's mean"
    how += "; dotted: guessing" if chance is not None else ""
    _heading(made, f"{metric} by {heading}", only, how)
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
        texts.append(with_interval(interval, "+") + ("" if math.isnan(p) else f"  p {probability(p)}"))
        values += difference.differences
        ends += [interval.low, interval.high]
    axes.set_xlim(*limits(values, ends, share=False))
    _right_texts(axes, texts)
    baseline = analysis.baseline_name
    axes.set_xlabel(plain(f"{metric}, minus that of {baseline}"), color=INK, fontsize=9.5)
    clear = "green better, red worse" if better else "blue different"
    how = f"rings: pairs of one seed; bar: {_level(analysis)}; {clear} (p < {_SIGNIFICANT} by Holm), grey unclear"
    _heading(made, f"Differences of {metric} to {baseline}", only, how)
    return made


def draw_pareto(analysis: Analysis, metric: str) -> Figure | None:
    """The metric against every cost that is known of two cells or more, with the front; None if there is no such."""
    indices, _ = shown_cells(analysis, metric, len(analysis.cells))
    costs = [analysis.costs[index] for index in indices]
    panels = [panel for panel in _PANELS if len({panel[1](cost) for cost in costs} - {None}) > 1]
    if not panels:
        return None
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    made = figure(5.6 * columns + (2.6 if len(indices) <= LINES else 0), 3.9 * lines + 0.8)
    grid = made.subplots(lines, columns, squeeze=False)
    for place, (name, cost_of, unit) in enumerate(panels):
        axes = grid[place // columns][place % columns]
        timed = [max(cost.latency) for cost in costs if cost.latency]
        after = f" after {tokens(timed[0])} tokens" if timed else ""
        label = name.format(context=tokens(costs[0].context), measured=after)
        _pareto(axes, analysis, metric, indices, [cost_of(cost) for cost in costs], unit)
        axes.set_xlabel(label, color=INK, fontsize=9.5)
        axes.set_ylabel(plain(metric_label(metric)), color=INK, fontsize=9.5)
    for place in range(len(panels), lines * columns):
        grid[place // columns][place % columns].set_visible(False)
    if len(indices) <= LINES:
        handles, names = grid[0][0].get_legend_handles_labels()
        made.legend(handles, names, loc="outside right upper", frameon=False, fontsize=8.5)
    how = f"bars: {_level(analysis)}; line: the cells that no other beats in both"
    _heading(made, f"{metric} against costs", "", how)
    return made


def _pareto(
    axes: Axes,
    analysis: Analysis,
    metric: str,
    indices: list[int],
    costs: list[float | None],
    unit: Callable[[float], str],
) -> None:
    intervals = [analysis.results[metric][index].interval for index in indices]
    sign = -1 if is_cost(metric) else 1
    spent = [math.nan if cost is None else float(cost) for cost in costs]
    front = pareto_front(spent, [sign * interval.mean for interval in intervals])
    if front:
        across, height = [spent[place] for place in front], [intervals[place].mean for place in front]
        axes.plot(across, height, color=FAINT, linewidth=1.2, drawstyle="steps-post", zorder=1, label="front")
    names = cell_names(analysis, indices)[1]
    for place, interval in enumerate(intervals):
        if math.isnan(spent[place]):
            continue
        few = len(indices) <= LINES
        colour = COLOURS[place % LINES] if few else COLOURS[0 if place in front else -1]
        if few or place in front:
            axes.plot([spent[place]] * 2, [interval.low, interval.high], color=colour, linewidth=1.4, alpha=0.75)
        mark = MARKERS[place % len(MARKERS)] if few else "o"
        size = 6.5 if few or place in front else 3.5
        axes.plot([spent[place]], [interval.mean], mark, color=colour, markersize=size, zorder=3, label=names[place])
        if not few and place in front:
            at = (spent[place], interval.mean)
            axes.annotate(names[place], at, (5, 4), textcoords="offset points", fontsize=7, zorder=5)
    known = [cost for cost in spent if not math.isnan(cost) and cost > 0]
    if known and max(known) > 4 * min(known):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    texts = [unit(value) for value in axes.get_xticks()]
    if len(set(texts)) == len(texts):  # else the costs differ in digits that units for people leave out
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: unit(value)))
    else:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    means = [interval.mean for interval in intervals]
    ends = [end for interval in intervals for end in (interval.low, interval.high)]
    axes.set_ylim(*limits(means, ends, is_share(metric)))
    tidy(axes)


def _milliseconds(value: float) -> str:
    return f"{number(1e3 * value)} ms"


_RING: dict[str, Any] = {"markersize": 4.5, "markerfacecolor": "white", "markeredgecolor": FAINT, "zorder": 4}
_PANELS = (
    ("parameters", lambda cost: cost.parameters, parameters),
    ("forward FLOPs per token, {context} tokens", lambda cost: cost.flops, lambda value: with_prefix(value, "")),
    ("state of one row after {context} tokens", lambda cost: cost.state_bytes, lambda value: with_prefix(value, "B")),
    ("measured time of a decode step{measured}", lambda cost: cost.decode_seconds, _milliseconds),
)


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


def _heading(made: Figure, text: str, only: str, how: str) -> None:
    title(made, f"{text} ({only})" if only else text, how)


def _level(analysis: Analysis) -> str:
    return f"{100 * analysis.settings.level:g} % interval"
