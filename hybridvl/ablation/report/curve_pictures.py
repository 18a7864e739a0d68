"""Pictures over something that is ordered: learning curves with bands, and a metric by slice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from hybridvl.ablation.report.analysis import Analysis
from hybridvl.ablation.report.cells import CellRuns
from hybridvl.ablation.report.events import Curve
from hybridvl.ablation.report.guessing import SAME, guessing
from hybridvl.ablation.report.metrics import is_share, metric_label
from hybridvl.ablation.report.naming import cell_names, shared_labels, shown_cells
from hybridvl.ablation.report.slices import Slices, slices_of
from hybridvl.ablation.report.style import COLOURS, LINES, MARKERS, legend, legend_height, limits, tidy, title
from hybridvl.ablation.statistics import mean_interval
from hybridvl.pictures import INK, figure, plain

_POINTS = 120  # of a line with a band
_GUESSING = "guessing"
_PANELS = 6  # of slices of one metric in a picture


@dataclass(frozen=True)
class Band:
    """The mean of several curves and its interval.

    Attributes:
        steps, mean, low, high: (points,); low and high are NaN for a single curve.
    """

    steps: NDArray[np.float64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def curve_tags(analysis: Analysis, metric: str) -> list[str]:
    """The scalars over steps that belong to a metric: itself, the same of the validation, and the losses."""
    name = metric.rpartition("/")[2]
    wanted = dict.fromkeys((metric, f"val/{name}", "val/loss", "train/loss"))
    lengths: dict[str, int] = dict.fromkeys(wanted, 0)
    for cell in analysis.cells:
        for run in cell.used.values():
            for tag in wanted:
                if tag in run.curves:
                    lengths[tag] = max(lengths[tag], len(run.curves[tag].steps))
    return [tag for tag, length in lengths.items() if length > 1][:3]


def band(curves: Sequence[Curve], analysis: Analysis) -> Band:
    """Mean and interval of curves where all of them have values, by straight lines between their points."""
    first, last = max(c.steps[0] for c in curves), min(c.steps[-1] for c in curves)
    steps = np.unique(np.concatenate([c.steps for c in curves]))
    steps = steps[(steps >= first) & (steps <= last)]
    if len(steps) > _POINTS:
        steps = steps[np.linspace(0, len(steps) - 1, _POINTS).round().astype(np.int64)]
    values = np.stack([np.interp(steps, c.steps, c.values) for c in curves])  # (curves, points)
    settings = analysis.settings
    found = [mean_interval(column, settings.interval, settings.level) for column in values.T]
    ends = np.array([(i.mean, i.low, i.high) for i in found]).reshape(-1, 3)
    return Band(steps.astype(np.float64), ends[:, 0], ends[:, 1], ends[:, 2])


def draw_curves(analysis: Analysis, metric: str) -> Figure | None:
    """A panel for each of `curve_tags`, a line with a band for each cell; None if nothing was logged twice."""
    tags = curve_tags(analysis, metric)
    indices, only = shown_cells(analysis, metric, LINES)
    if not tags or not indices:
        return None
    heading, names = cell_names(analysis, indices)
    made = figure(3.7 * len(tags) + 2.4, max(4.2, legend_height(names)))
    panels = made.subplots(1, len(tags), squeeze=False)[0]
    for axes, tag in zip(panels, tags, strict=True):
        _curves(axes, analysis, tag, indices, names)
    legend(made, panels, heading, names)
    how = f"lines: mean of seeds; bands: {analysis.settings.percent} interval, where there are two seeds or more"
    how += shared_labels(analysis, indices)
    title(made, "Learning curves", how, only)
    return made


def draw_slices(analysis: Analysis, metric: str) -> Figure | None:
    """The metric over what its slices are ranges of, a panel for each kind of slice; None if there are none."""
    found = [part for part in slices_of(metric, analysis.logged) if len(part.metrics) > 1][:_PANELS]
    indices, only = shown_cells(analysis, metric, LINES)
    if not found or not indices:
        return None
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    heading, names = cell_names(analysis, indices)
    height = max(3.9 * rows + 0.6, legend_height([*names, _GUESSING]))
    made = figure((5.0 if columns < 3 else 3.7) * columns + 2.4, height)
    grid = made.subplots(rows, columns, squeeze=False)
    for place, part in enumerate(found):
        _slices(grid[place // columns][place % columns], analysis, metric, part, indices, names)
    for place in range(len(found), rows * columns):
        grid[place // columns][place % columns].set_visible(False)
    legend(made, grid.flat, heading, [*names, _GUESSING])
    what = f"{metric} by {' and '.join(dict.fromkeys(part.axis for part in found))}"
    how = f"marks: mean of seeds; bars: {analysis.settings.percent} interval" + shared_labels(analysis, indices)
    title(made, what, how, only)
    return made


def _curves(axes: Axes, analysis: Analysis, tag: str, indices: Sequence[int], names: Sequence[str]) -> None:
    means: list[float] = []
    ends: list[float] = []
    for place, (index, name) in enumerate(zip(indices, names, strict=True)):
        curves = _of(analysis.cells[index], tag)
        if not curves:
            continue
        found = band(curves, analysis)
        colour = COLOURS[place % LINES]
        few = len(found.steps) < 30
        axes.plot(
            found.steps, found.mean, color=colour, linewidth=1.8, label=name,
            marker=MARKERS[place % len(MARKERS)] if few else None, markersize=4,
        )  # fmt: skip
        axes.fill_between(found.steps, found.low, found.high, color=colour, alpha=0.15, linewidth=0)
        means += found.mean.tolist()
        ends += [*found.low.tolist(), *found.high.tolist()]
    known = [mean for mean in means if mean > 0]
    if not is_share(tag) and len(known) == len(means) and known and max(known) > 30 * min(known):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(min(known) / 1.5, max(known) * 1.5)  # bands may reach below 0
    else:
        axes.set_ylim(*limits(means, [*means, *_near(means, ends)], is_share(tag)))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("optimizer steps", color=INK, fontsize=9.5)
    axes.set_ylabel(plain(metric_label(tag)), color=INK, fontsize=9.5)
    tidy(axes)


def _slices(
    axes: Axes, analysis: Analysis, metric: str, part: Slices, indices: Sequence[int], names: Sequence[str]
) -> None:
    means: list[float] = []
    ends: list[float] = []
    for place, (index, name) in enumerate(zip(indices, names, strict=True)):
        # Side by side, so that bars of equal height can be told apart.
        shift = 0.5 * ((place + 0.5) / len(indices) - 0.5)
        found = [
            (at + shift, analysis.results[slice_metric][index].interval)
            for at, slice_metric in enumerate(part.metrics)
            if analysis.results[slice_metric][index].values
        ]
        if not found:
            continue
        at = [where for where, _ in found]
        heights = [interval.mean for _, interval in found]
        colour = COLOURS[place % LINES]
        axes.plot(
            at, heights, MARKERS[place % len(MARKERS)], color=colour, markersize=5, label=name,
            linestyle="-" if part.ordered else "none", linewidth=1.5,
        )  # fmt: skip
        for where, interval in found:
            axes.plot([where, where], [interval.low, interval.high], color=colour, linewidth=1.2, alpha=0.6)
            ends += [interval.low, interval.high]
        means += heights
    asked = [analysis.cells[index] for index in indices if analysis.results[part.metrics[0]][index].values]
    chances = guessing(asked, part.metrics)
    if len(chances) == len(part.metrics):
        # A level for each part, with gaps between those that differ.
        places = [where for at in range(len(part.metrics)) for where in (at - 0.35, at + 0.35, at + 0.5)]
        levels = [chances[name] for name in part.metrics]
        apart = max(levels) - min(levels) > SAME
        heights = [height for level in levels for height in (level, level, math.nan if apart else level)]
        axes.plot(places, heights, color=INK, linestyle=":", linewidth=1.2, label=_GUESSING, zorder=1)
        means += levels
    axes.set_xticks(range(len(part.labels)), [plain(label) for label in part.labels])
    if max(map(len, part.labels)) * len(part.labels) > 40:
        axes.tick_params(axis="x", rotation=30)
    axes.set_ylim(*limits(means, ends, is_share(metric), floor=is_share(metric)))
    axes.set_xlabel(plain(part.axis), color=INK, fontsize=9.5)
    axes.set_ylabel(plain(metric_label(metric)), color=INK, fontsize=9.5)
    if part.panel:
        axes.set_title(plain(part.panel), fontsize=9.5, color=INK, loc="left")
    tidy(axes)


def _of(cell: CellRuns, tag: str) -> list[Curve]:
    return [run.curves[tag] for run in cell.used.values() if tag in run.curves and len(run.curves[tag].steps)]


def _near(means: Sequence[float], ends: Sequence[float]) -> list[float]:
    """Ends of intervals within the range of the means widened by a third: what two seeds leave open is cut."""
    if not means:
        return []
    room = (max(means) - min(means)) / 3
    return [min(max(end, min(means) - room), max(means) + room) for end in ends if end == end]
