"""A picture of layer patterns: one coloured strip each with its totals, parameters by part, state over context."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from hybridvl.pattern.canonical import period
from hybridvl.pictures import FAINT, GRID, INK, default_style, figure, plain
from hybridvl.plan.costs import Plan
from hybridvl.plan.units import parameters, tokens, with_prefix

# Told apart by people with any colour vision (after Okabe and Ito); mixers of other packages take the spare ones.
_COLOURS = {"full": "#c8553d", "swa": "#e9a23b", "gdn": "#2f6690", "mamba2": "#3a9679"}
_SPARE = ("#7d5ba6", "#c06c9b", "#6b705c", "#5fa8d3", "#8d6e63")
_LINES = ("#22252b", "#a23e48", "#3d5a80", "#6a994e", "#8d6a9f", "#bc8034")
_PARTS = {
    "vision": ("vision tower", "#b9c2cf"),
    "embeddings": ("embeddings", "#8b98ad"),
    "head": ("output head", "#66758f"),
    "mlps": ("MLPs", "#dcd6c8"),
    "norms": ("norms", "#9a9a9a"),
    "mixers": ("mixers", "#2b2d42"),
}
_LABEL_POINTS = 12  # least distance of labels
_LEAST_SHARE = 0.002  # of the parameters: smaller parts cannot be seen

# Inches.
_WIDTH, _MARGIN = 12.0, 0.45
_LEGEND, _HEAD, _ROW, _FOOT = 0.5, 0.66, 0.42, 0.42  # the mixers' legend; above, in and below a strip
_PANEL_TITLE, _BAR, _PANEL_FOOT, _LEAST_PANEL = 0.5, 0.62, 0.8, 2.2

_LEAST_PER_ROW, _PER_ROW, _MOST_ROWS = 16, 72, 8  # layers in a row of a strip; beyond 8 rows they become thinner


@default_style()
def draw(plans: Sequence[Plan], path: Path | BinaryIO) -> None:
    """Write a PNG of one or several patterns, planned for the same contexts, to a path or an open file."""
    span = max(_per_row(plan) for plan in plans)
    strips = [_HEAD + _ROW * _rows(plan, span) + _FOOT for plan in plans]
    panel = max(_BAR * len(plans), _LEAST_PANEL)
    height = _LEGEND + sum(strips) + _PANEL_TITLE + panel + _PANEL_FOOT
    made = figure(_WIDTH, height, layout=None)
    colours = _colours(plans)
    inner = _WIDTH - 2 * _MARGIN
    top = 0.1
    _legend(_place(made, _MARGIN, top, inner, _LEGEND), colours)
    top += _LEGEND
    for number, (plan, strip) in enumerate(zip(plans, strips, strict=True), start=1):
        axes = _place(made, _MARGIN, top, inner, strip)
        _strip(axes, plan, colours, span, _numbered(plan, number, plans, 100))
        top += strip
    top += _PANEL_TITLE - 0.1
    _params_panel(_place(made, _MARGIN, top, 5.6, panel), plans)
    _state_panel(_place(made, _MARGIN + 6.6, top, inner - 7.1, panel), plans)
    made.savefig(path, format="png")


def _place(made: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place in inches from the upper left."""
    across, down = made.get_size_inches()
    return made.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))


def _per_row(plan: Plan) -> int:
    """Layers in a row of the strip; a strip of several rows breaks after whole repetitions if they fit."""
    layers = len(plan.layers)
    if layers <= _PER_ROW:
        return max(layers, _LEAST_PER_ROW)
    repeated = period([layer.text for layer in plan.layers])
    most = max(-(-layers // _MOST_ROWS), _PER_ROW)
    return most - most % repeated if repeated <= most else most


def _rows(plan: Plan, span: int) -> int:
    return -(-len(plan.layers) // span)


def _colours(plans: Sequence[Plan]) -> dict[str, str]:
    """A colour per mixer as written: its kind's, lighter for each further set of options."""
    bases = dict(_COLOURS)
    found: dict[str, str] = {}
    variants: dict[str, int] = {}
    for text, kind in (mixer for plan in plans for layer in plan.layers for mixer in layer.mixers):
        if text not in found:
            base = bases.setdefault(kind, _SPARE[(len(bases) - len(_COLOURS)) % len(_SPARE)])
            found[text] = _lighter(base, variants.get(kind, 0))
            variants[kind] = variants.get(kind, 0) + 1
    return found


def _lighter(colour: str, steps: int) -> str:
    hue, light, saturation = colorsys.rgb_to_hls(*to_rgb(colour))
    return to_hex(colorsys.hls_to_rgb(hue, light + (0.92 - light) * (1 - 0.6**steps), saturation))


def _legend(axes: Axes, colours: dict[str, str]) -> None:
    axes.axis("off")
    shown = list(colours.items())[:10]
    handles = [Patch(facecolor=colour, label=_shortened(text, 40)) for text, colour in shown]
    axes.legend(
        handles=handles,
        loc="center left",
        bbox_to_anchor=(-0.006, 0.5),
        ncols=5,
        frameon=False,
        fontsize=11,
        handlelength=1.1,
        handleheight=1.1,
        labelcolor=INK,
    )


def _strip(axes: Axes, plan: Plan, colours: dict[str, str], span: int, title: str) -> None:
    """The layers from left to right, `span` in a row; side-by-side mixers share a cell. One y unit is a row."""
    rows = _rows(plan, span)
    gap = 0.08 if span <= _PER_ROW else 0.0
    axes.set_xlim(0, span)
    axes.set_ylim(-rows - _FOOT / _ROW, _HEAD / _ROW)
    axes.axis("off")
    for index, layer in enumerate(plan.layers):
        row, column = divmod(index, span)
        height = 0.86 / len(layer.mixers)
        for place, (text, _) in enumerate(layer.mixers):
            corner = (column, -row - 0.07 - height * (place + 1))
            axes.add_patch(Rectangle(corner, 1 - gap, height, facecolor=colours[text], linewidth=0))
    if rows == 1:
        for index in range(0, len(plan.layers), 4 * -(-span // _PER_ROW)):
            axes.text(index + (1 - gap) / 2, -1.12, str(index), fontsize=8, color=FAINT, ha="center", va="center")
    last = plan.contexts[-1]
    flops, state = with_prefix(plan.decode_flops(last), "FLOPs"), with_prefix(plan.state_bytes(last), "B")
    size = f"{len(plan.layers)} layers   ·   {parameters(plan.total_params)} parameters"
    summary = f"{size}   ·   at {last:,} tokens: {flops} per token, {state} of state"
    axes.text(0, 1.08, title, fontsize=13, fontweight="bold", color=INK, va="center")
    axes.text(0, 0.4, summary, fontsize=10, color=FAINT, va="center")


def _params_panel(axes: Axes, plans: Sequence[Plan]) -> None:
    """Parameters by part: one bar per pattern, under its name. One y unit is a pattern."""
    _dress(axes, "Parameters")
    most = max(plan.total_params for plan in plans)
    for place, plan in enumerate(plans):
        end = 0
        for part, (_, colour) in _PARTS.items():
            axes.barh(place + 0.72, plan.params[part], left=end, height=0.4, color=colour)
            end += plan.params[part]
        axes.text(end + most * 0.012, place + 0.73, parameters(end), va="center", fontsize=9.5, color=INK)
        name = _numbered(plan, place + 1, plans, 70)
        axes.text(0, place + 0.34, name, va="center", fontsize=9.5, color=INK)
    axes.set_xlim(0, most * 1.13)
    axes.set_ylim(max(len(plans), _LEAST_PANEL / _BAR), 0)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: parameters(value)))
    axes.grid(axis="x", color=GRID)
    visible = [
        Patch(facecolor=colour, label=name)
        for part, (name, colour) in _PARTS.items()
        if max(plan.params[part] for plan in plans) > _LEAST_SHARE * most
    ]
    axes.legend(
        handles=visible,
        loc="upper left",
        bbox_to_anchor=(-0.012, -0.3 / (_BAR * axes.get_ylim()[0])),
        ncols=6,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handlelength=1.0,
        columnspacing=1.2,
    )


def _state_panel(axes: Axes, plans: Sequence[Plan]) -> None:
    """State bytes over context, one line per pattern, with its number at its end."""
    _dress(axes, f"State of one row, {plans[0].dtype}")
    contexts = plans[0].contexts
    ends: dict[int, list[str]] = {}
    for number, plan in enumerate(plans, start=1):
        sizes = [plan.state_bytes(context) for context in contexts]
        colour = _LINES[(number - 1) % len(_LINES)]
        axes.plot(contexts, sizes, marker="o", markersize=5, linewidth=2.2, color=colour)
        ends.setdefault(sizes[-1], []).append(str(number))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = [plan.state_bytes(context) for plan in plans for context in contexts]
    axes.set_ylim(min(sizes) / 2.5, max(sizes) * 2.5)
    if len(plans) > 1:
        _label_ends(axes, contexts[-1], ends)
    axes.set_xticks(contexts, [tokens(context) for context in contexts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 3.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: with_prefix(value, "B")))
    axes.set_xlabel("tokens of context", fontsize=9.5, color=FAINT)
    axes.grid(color=GRID)


def _label_ends(axes: Axes, last: int, ends: dict[int, list[str]]) -> None:
    """Numbers of the patterns beside the ends of their lines, moved apart where they would overlap."""
    low, high = map(math.log, axes.get_ylim())
    inches = axes.get_window_extent().height / axes.figure.dpi
    above = -math.inf
    for size, numbers in sorted(ends.items()):
        place = (math.log(size) - low) / (high - low) * inches * 72  # points
        shown = above = max(place, above + _LABEL_POINTS)
        axes.annotate(
            ", ".join(numbers),
            (last, size),
            xytext=(9, shown - place),
            textcoords="offset points",
            va="center",
            fontsize=10,
            fontweight="bold",
            color=INK,
        )


def _dress(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9.5, labelcolor=FAINT)
    for side in axes.spines.values():
        side.set_visible(False)


def _numbered(plan: Plan, number: int, plans: Sequence[Plan], most: int) -> str:
    text = _shortened(plan.pattern, most)
    return f"{number}   {text}" if len(plans) > 1 else text


def _shortened(text: str, most: int) -> str:
    return plain(text if len(text) <= most else f"{text[: most - 3]}...")
