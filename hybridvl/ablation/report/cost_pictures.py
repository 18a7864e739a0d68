"""Pictures of costs: a metric against them, with the front, and costs against length."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from hybridvl.ablation.report.analysis import Analysis
from hybridvl.ablation.report.cells import CellRuns
from hybridvl.ablation.report.metrics import is_cost, is_share, metric_label
from hybridvl.ablation.report.naming import cell_names, shown_cells
from hybridvl.ablation.report.style import (
    COLOURS,
    FAINT,
    INK,
    LINES,
    MARKERS,
    figure,
    legend,
    limits,
    plain,
    tidy,
    title,
)
from hybridvl.ablation.statistics import pareto_front
from hybridvl.plan.units import parameters, tokens, with_prefix

_STYLES = ("-", "--", ":", "-.")  # of the fronts of several tasks


def draw_pareto(analysis: Analysis, metric: str) -> Figure | None:
    """The metric against every cost that is known of two cells or more, with the front; None if there is no such."""
    indices, _ = shown_cells(analysis, metric, len(analysis.cells))
    costs = [analysis.costs[index] for index in indices]
    panels = [panel for panel in _PANELS if len({panel[1](cost) for cost in costs} - {None}) > 1]
    if not panels:
        return None
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    few, left = len(indices) <= LINES, lines * columns > len(panels)
    made = figure(5.3 * columns + (2.6 if few and not left else 0), 3.9 * lines + 0.8)
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
        grid[place // columns][place % columns].set_axis_off()
    if few:
        handles, names = grid[0][0].get_legend_handles_labels()
        where = grid[-1][-1] if left else made
        where.legend(handles, names, loc="center left" if left else "outside right upper", frameon=False, fontsize=8.5)
    how = f"bars: {100 * analysis.settings.level:g} % interval; line: the cells that no other beats in both"
    if len({_task(analysis.cells[index]) for index in indices}) > 1:
        how += ", of each task by itself"
    title(made, f"{metric} against costs", how)
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
    tasks = [_task(analysis.cells[index]) for index in indices]
    front = []
    for number, task in enumerate(dict.fromkeys(tasks)):  # shares of right answers to other questions do not compare
        own = [place for place, other in enumerate(tasks) if other == task]
        best = pareto_front([spent[place] for place in own], [sign * intervals[place].mean for place in own])
        found = [own[place] for place in best]
        across, height = [spent[place] for place in found], [intervals[place].mean for place in found]
        label = None if number else "front"
        axes.plot(across, height, color=FAINT, label=label, **_front(number))
        front += found
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


def draw_growth(analysis: Analysis, metric: str) -> Figure | None:
    """Bytes of state, and time of a decode step where it was measured, of each cell's model against tokens; None if no
    model is known. Of models that cost the same the first is drawn."""
    indices, only = shown_cells(analysis, metric, LINES)
    first: dict[object, int] = {}
    for index in indices:
        cost = analysis.costs[index]
        if cost.growth:
            first.setdefault((tuple(cost.growth.values()), tuple(cost.latency.values())), index)
    shown = list(first.values())
    if not shown:
        return None
    timed = any(analysis.costs[index].latency for index in shown)
    made = figure(12.4 if timed else 7.6, 4.2)
    panels = made.subplots(1, 2 if timed else 1, squeeze=False)[0]
    heading, names = cell_names(analysis, shown)
    for place, (index, name) in enumerate(zip(shown, names, strict=True)):
        cost, colour = analysis.costs[index], COLOURS[place % LINES]
        for axes, values, scale in zip(panels, (cost.growth, cost.latency), (1.0, 1e3), strict=False):
            look = {"color": colour, "marker": MARKERS[place % len(MARKERS)], "markersize": 5}
            axes.plot([*values], [scale * value for value in values.values()], label=name, linewidth=1.6, **look)
        for length, blocks in cost.latency_blocks.items():
            panels[-1].vlines(length, 1e3 * min(blocks), 1e3 * max(blocks), color=colour, linewidth=1.6, alpha=0.6)
    for axes, values in zip(panels, (analysis.costs[shown[0]].growth, analysis.costs[shown[0]].latency), strict=False):
        _token_axis(axes, [*values])
        axes.set_yscale("log")
    panels[0].set_ylabel("state of one row", color=INK, fontsize=9.5)
    panels[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: with_prefix(value, "B")))
    if timed:
        panels[1].set_ylabel("measured time of a decode step (ms)", color=INK, fontsize=9.5)
        panels[1].yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        panels[1].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panels[1].yaxis.set_minor_formatter(NullFormatter())
    legend(made, panels, heading, names)
    how = "models that cost the same have one line"
    if timed:
        how += "; times on this machine's CPU in float32: the shortest, bars: up to that of the slowest block of rounds"
    title(made, f"Costs against length ({only})" if only else "Costs against length", how)
    return made


def _token_axis(axes: Axes, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens(int(value))))
    axes.set_xlabel("tokens", color=INK, fontsize=9.5)
    tidy(axes)


def _front(number: int) -> dict[str, Any]:
    """The look of the front of a task."""
    return {"linewidth": 1.2, "drawstyle": "steps-post", "zorder": 1, "linestyle": _STYLES[number % len(_STYLES)]}


def _milliseconds(value: float) -> str:
    return f"{1e3 * value:.4g}"


def _task(cell: CellRuns) -> str:
    """What the cell's runs were asked."""
    run = next(iter(cell.used.values()), None)
    return "" if run is None else json.dumps(run.section("data", "task"), sort_keys=True)


_PANELS = (
    ("parameters", lambda cost: cost.parameters, parameters),
    ("forward FLOPs per token, {context} tokens", lambda cost: cost.flops, lambda value: with_prefix(value, "")),
    ("state of one row after {context} tokens", lambda cost: cost.state_bytes, lambda value: with_prefix(value, "B")),
    ("measured time of a decode step{measured} (ms)", lambda cost: cost.decode_seconds, _milliseconds),
)
