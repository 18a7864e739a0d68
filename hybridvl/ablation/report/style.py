"""How the pictures of a report look: colours, marks, axes."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hybridvl.pictures import FAINT, GRID, INK, plain

COLOURS = (
    *("#2f6690", "#c8553d", "#3a9679", "#e9a23b", "#7d5ba6"),
    *("#d0699a", "#4aa3b8", "#8a6d4b", "#8fa32f", "#5b6470"),
)
MARKERS = "osD^vPX<>*"
_LETTERS = 15  # of the smallest size, an inch
LINES = len(COLOURS)  # more cells than this cannot be told apart by colour


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


def title(made: Figure, text: str, below: str = "", only: str = "") -> None:
    """What a figure shows, of which cells if not of all, and in smaller letters how."""
    said = plain(f"{text} ({only})" if only else text)
    made.suptitle(said, fontsize=12, color=INK, x=0.01, ha="left", fontweight="bold")
    if below:
        lines = textwrap.wrap(below, int(_LETTERS * made.get_figwidth()))
        made.supxlabel(plain("\n".join(lines)), fontsize=8, color=FAINT, x=0.01, ha="left")


def legend_height(names: Sequence[str]) -> float:
    """Inches that a figure must be high for a legend of names, of several lines each."""
    return 0.9 + 0.178 * sum(name.count("\n") + 1 for name in names)


def legend(made: Figure, panels: Iterable[Axes], heading: str, names: Sequence[str]) -> None:
    """One legend of all panels, beside them, in the order of the cells."""
    found: dict[str, Artist] = {}
    for axes in panels:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    shown = [name for name in names if name in found]
    made_legend = made.legend(
        [found[name] for name in shown], shown, loc="outside right center", frameon=False, fontsize=8.5
    )
    if heading:
        made_legend.set_title(plain(heading))


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
