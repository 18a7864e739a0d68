"""Pictures of costs: a metric against them, with the front, and costs against length."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from hybridvl.ablation.report.analysis import Analysis
from hybridvl.ablation.report.cells import CellRuns
from hybridvl.ablation.report.metrics import is_cost, is_share, metric_label
from hybridvl.ablation.report.naming import cell_names, shared_labels, shown_cells
from hybridvl.ablation.report.style import COLOURS, LINES, MARKERS, legend, legend_height, limits, tidy, title
from hybridvl.ablation.statistics import pareto_front
from hybridvl.pictures import FAINT, INK, figure, plain
from hybridvl.plan.units import parameters, tokens, with_prefix

_LISTED = 12  # cells on fronts that are named, of many
_TRAINING = ("train_", "augment", "turns")  # arguments of tasks that change nothing of the test
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
    spent = [[_number(cost_of(cost)) for cost in costs] for _, cost_of, _ in panels]
    fronts = [_fronts(analysis, metric, indices, values) for values in spent]
    shown = indices if few else [indices[place] for place in sorted({p for fs in fronts for f in fs for p in f})]
    names = cell_names(analysis, shown)[1]
    if not few:
        names = [f"{number}  {name}" for number, name in enumerate(names[:_LISTED], 1)]
    marks = dict(zip(shown, names, strict=False))
    high = max(3.9 * lines + 0.8, 0 if left else legend_height(names))
    made = figure(5.3 * columns + (0 if left else 2.6), high)
    grid = made.subplots(lines, columns, squeeze=False)
    for place, (name, _, unit) in enumerate(panels):
        axes = grid[place // columns][place % columns]
        timed = [max(cost.latency) for cost in costs if cost.latency]
        after = f" after {tokens(timed[0])} tokens" if timed else ""
        label = name.format(context=tokens(costs[0].context), measured=after)
        _pareto(axes, analysis, metric, indices, spent[place], fronts[place], marks)
        _cost_axis(axes, spent[place], unit)
        axes.set_xlabel(label, color=INK, fontsize=9.5)
        axes.set_ylabel(plain(metric_label(metric)), color=INK, fontsize=9.5)
        tidy(axes)
    for place in range(len(panels), lines * columns):
        grid[place // columns][place % columns].set_axis_off()
    handles, texts = grid[0][0].get_legend_handles_labels()
    if not few:
        handles, texts = [Line2D([], [], linestyle="none")] * len(names), names
    where = grid[-1][-1] if left else made
    where.legend(handles, texts, loc="center left" if left else "outside right upper", frameon=False, fontsize=8.5)
    how = f"bars: {analysis.settings.percent} interval; line: the cells that no other beats in both"
    if len({_task(analysis.cells[index]) for index in indices}) > 1:
        how += ", of each task by itself"
    title(made, f"{metric} against costs", how + shared_labels(analysis, shown))
    return made


def _fronts(analysis: Analysis, metric: str, indices: list[int], spent: list[float]) -> list[list[int]]:
    """The places on the front of each task: shares of right answers to other questions do not compare."""
    sign = -1 if is_cost(metric) else 1
    qualities = [sign * analysis.results[metric][index].interval.mean for index in indices]
    tasks = [_task(analysis.cells[index]) for index in indices]
    found = []
    for task in dict.fromkeys(tasks):
        own = [place for place, other in enumerate(tasks) if other == task]
        front = pareto_front([spent[place] for place in own], [qualities[place] for place in own])
        found.append([own[place] for place in front])
    return found


def _pareto(
    axes: Axes,
    analysis: Analysis,
    metric: str,
    indices: list[int],
    spent: list[float],
    fronts: list[list[int]],
    marks: Mapping[int, str],
) -> None:
    """One panel: a mark for each cell, of many a number for those on a front; marks: names by the cell's index."""
    intervals = [analysis.results[metric][index].interval for index in indices]
    few, ahead = len(indices) <= LINES, {place for front in fronts for place in front}
    for number, front in enumerate(fronts):
        across, height = [spent[place] for place in front], [intervals[place].mean for place in front]
        axes.plot(across, height, color=FAINT, label=None if number else "front", **_front(number))
    for place, (index, interval) in enumerate(zip(indices, intervals, strict=True)):
        if math.isnan(spent[place]):
            continue
        told = few or place in ahead
        colour = COLOURS[place % LINES] if few else COLOURS[0 if told else -1]
        if told:
            axes.plot([spent[place]] * 2, [interval.low, interval.high], color=colour, linewidth=1.4, alpha=0.75)
        look: dict[str, Any] = {"color": colour, "markersize": 6.5 if told else 3.5, "zorder": 3}
        mark = MARKERS[place % len(MARKERS)] if few else "o"
        axes.plot([spent[place]], [interval.mean], mark, label=marks.get(index), **look)
        if not few and told and index in marks:
            at, said = (spent[place], interval.mean), marks[index].partition(" ")[0]
            axes.annotate(said, at, (5, 3), textcoords="offset points", fontsize=8, zorder=5)
    means = [interval.mean for interval in intervals]
    ends = [end for interval in intervals for end in (interval.low, interval.high)]
    axes.set_ylim(*limits(means, ends, is_share(metric)))


def _cost_axis(axes: Axes, spent: list[float], unit: Callable[[float], str]) -> None:
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
    heading, names = cell_names(analysis, shown)
    made = figure(12.4 if timed else 7.6, max(4.2, legend_height(names)))
    panels = made.subplots(1, 2 if timed else 1, squeeze=False)[0]
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
    how += shared_labels(analysis, shown)
    title(made, "Costs against length", how, only)
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


def _number(cost: float | None) -> float:
    return math.nan if cost is None else float(cost)


def _milliseconds(value: float) -> str:
    return f"{1e3 * value:.4g}"


def _task(cell: CellRuns) -> str:
    """What the cell's runs were asked."""
    arguments = cell.section("data", "task", "init_args")
    asked = {key: value for key, value in arguments.items() if not key.startswith(_TRAINING)}
    return json.dumps({**cell.section("data", "task"), "init_args": asked}, sort_keys=True)


_PANELS = (
    ("parameters", lambda cost: cost.parameters, parameters),
    ("forward FLOPs per token, {context} tokens", lambda cost: cost.flops, lambda value: with_prefix(value, "")),
    ("state of one row after {context} tokens", lambda cost: cost.state_bytes, lambda value: with_prefix(value, "B")),
    ("measured time of a decode step{measured} (ms)", lambda cost: cost.decode_seconds, _milliseconds),
)
