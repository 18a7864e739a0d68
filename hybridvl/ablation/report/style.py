"""How the pictures of a report look: colours, marks, axes, and which cells a picture has room for."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hybridvl.ablation.report.analysis import Analysis
from hybridvl.ablation.report.metrics import is_cost

INK, FAINT, GRID = "#22252b", "#6b7280", "#e5e7eb"
COLOURS = (
    *("#2f6690", "#c8553d", "#3a9679", "#e9a23b", "#7d5ba6"),
    *("#d0699a", "#4aa3b8", "#8a6d4b", "#8fa32f", "#5b6470"),
)
MARKERS = "osD^vPX<>*"
LINES = len(COLOURS)  # more cells than this cannot be told apart by colour
_NAME_WIDTH = 44  # characters of a name in a picture


def figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches."""
    made = Figure(figsize=(width, height), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(made)
    return made


def tidy(axes: Axes, grid: str = "both") -> None:
    """Thin lines, no box, a faint grid behind."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#9ca3af")
    axes.tick_params(colors=INK, labelsize=8.5, length=3)
    if grid in ("x", "both"):
        axes.grid(axis="x", color=GRID, linewidth=0.8)
    if grid in ("y", "both"):
        axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def title(made: Figure, text: str, below: str = "") -> None:
    """What a figure shows, and in smaller letters how."""
    made.suptitle(plain(text), fontsize=12, color=INK, x=0.01, ha="left", fontweight="bold")
    if below:
        made.supxlabel(plain(below), fontsize=8, color=FAINT, x=0.01, ha="left")


def plain(text: str) -> str:
    """A text that matplotlib takes as it is."""
    return text.replace("$", r"\$")


def cell_names(analysis: Analysis, indices: Sequence[int]) -> tuple[str, list[str]]:
    """What the names of cells are of, and the names: values alone where there is only one label."""
    keys = {key for index in indices for key in analysis.cells[index].labels}
    if len(keys) == 1:
        (key,) = keys
        names = [analysis.cells[index].labels.get(key, "-") for index in indices]
        return key.split(".")[-1], [wrapped(name) for name in names]
    return "", [wrapped(analysis.cells[index].name) for index in indices]


def wrapped(name: str) -> str:
    """A name on lines that are short enough."""
    return plain("\n".join(textwrap.wrap(name, _NAME_WIDTH)) or name)


def shown_cells(analysis: Analysis, metric: str, most: int) -> tuple[list[int], str]:
    """The cells that have a metric, in order; of more than `most` the best, and then a note that says so."""
    results = analysis.results[metric]
    found = [index for index, result in enumerate(results) if result.values]
    if len(found) <= most:
        return found, ""
    sign = 1 if is_cost(metric) else -1
    best = sorted(found, key=lambda index: sign * results[index].interval.mean)[:most]
    return sorted(best), f"the {most} best of {len(found):,} cells"


def metric_label(metric: str) -> str:
    """A metric with its unit, as far as its name tells."""
    if is_share(metric):
        return f"{metric} (share, 0 to 1)"
    units = {"seconds": "s", "step_s": "s", "bytes": "B", "tokens_per_s": "tokens/s", "loss": "nats", "entropy": "nats"}
    unit = next((unit for word, unit in units.items() if metric.endswith(word)), "")
    return f"{metric} ({unit})" if unit else metric


def is_share(metric: str) -> bool:
    """Whether a metric is a share of right answers."""
    return metric.endswith(("exact", "accuracy"))


def limits(values: Sequence[float], ends: Sequence[float], share: bool, floor: bool = False) -> tuple[float, float]:
    """Ends of an axis that shows all values, and of intervals what is near enough to be worth the room.

    share: keep within 0 and 1 where the values are. floor: begin at 0 or below.
    """
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return 0.0, 1.0
    low, high = min(known), max(known)
    room = (high - low) or abs(high) or 1.0
    low = max(min([low, *(end for end in ends if math.isfinite(end))]), low - 1.5 * room)
    high = min(max([high, *(end for end in ends if math.isfinite(end))]), high + 1.5 * room)
    pad = 0.06 * ((high - low) or room)
    low, high = low - pad, high + pad
    if share:
        low, high = max(low, -0.02), min(high, 1.02)
    return (min(low, 0.0) if floor else low), high
