"""Pictures of records: time and memory against length, ours and peers, and the ratios of a suite with their goals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator, ScalarFormatter

from hybridvl.bench.report import Record
from hybridvl.pictures import GRID, INK, default_style, figure
from hybridvl.plan.units import tokens, with_prefix

_COLOURS = ("#2f6690", "#c8553d", "#e9a23b", "#3a9679", "#7d5ba6", "#6b705c")
_MARKS: tuple[dict[str, Any], ...] = (
    {"marker": "o", "linestyle": "-"},
    {"marker": "s", "linestyle": "-"},
    {"marker": "x", "linestyle": "--"},  # lines that lie on each other can be told apart
    {"marker": "^", "linestyle": ":"},
)
_LENGTHS = {"decode": "tokens of context", "stream": "tokens of context", "prefill": "tokens of the prompt"}

Point = tuple[int, Record, Mapping[str, Any]]
"""A length, the record measured there, and one of its sides."""


@default_style()
def draw_lengths(records: Sequence[Record], title: str, path: Path) -> None:
    """Write `lengths_figure` as a PNG."""
    lengths_figure(records, title).savefig(path, format="png")


def lengths_figure(records: Sequence[Record], title: str) -> Figure:
    """Against the length: left the time with its quartiles, right the memory; within `default_style`.

    Of models the time is that of a token or a frame, and the memory what is held, weights and state; of operators it
    is the scratch memory, where it was measured.
    """
    lines: dict[str, list[Point]] = {}
    several = len({record["direction"] for record in records}) > 1
    for record in records:
        for side in record["sides"]:
            name = f"{side['name']}, {record['direction']}" if several else side["name"]
            lines.setdefault(name, []).append((int(record["sizes"]["T"]), record, side))
    made = figure(11, 4.6)
    made.suptitle(f"{title}\n{_sizes(records[0])}", fontsize=11, color=INK)
    time, memory = made.subplots(1, 2)
    held = all(side.get("state_bytes") is not None for points in lines.values() for _, _, side in points)
    for (name, points), colour, marks in zip(lines.items(), cycle(_COLOURS), cycle(_MARKS), strict=False):
        look = {"color": colour, "label": name, "markersize": 5, **marks}
        _draw_time(time, points, held, look)
        _draw_memory(memory, points, held, look)
    unit = "frame" if records[0].get("frames") else "token"
    label = _LENGTHS.get(records[0]["direction"], "tokens")
    lengths = sorted({length for points in lines.values() for length, _, _ in points})
    _length_axes(time, lengths, label, f"ms a {unit}" if held else "ms")
    _logarithmic(time)
    _length_axes(
        memory, lengths, label, "memory held: weights and state" if held else "MB of memory beside the results"
    )
    if held:
        memory.set_ylim(bottom=0)
        memory.yaxis.set_major_formatter(FuncFormatter(lambda size, _: with_prefix(size, "B")))
    else:
        _logarithmic(memory)
    return made


@default_style()
def draw_ratios(records: Sequence[Record], title: str, path: Path) -> None:
    """Write a PNG: the ratio of every other side's time to ours with its interval, and the goals."""
    rows = [(record, name, ratio) for record in records for name, ratio in record["ratios"].items()][::-1]
    made = figure(11, 0.32 * len(rows) + 1.4)
    axes = made.subplots()
    for place, (record, name, ratio) in enumerate(rows):
        goal = record["goal"] if name == record["goal_peer"] else None
        colour = _COLOURS[5] if goal is None else _COLOURS[0 if ratio["median"] >= goal else 1]
        axes.barh(place, ratio["median"], color=colour, height=0.6)
        axes.plot([ratio["low"], ratio["high"]], [place, place], color=INK, linewidth=1)
        if goal is not None:
            axes.plot([goal, goal], [place - 0.4, place + 0.4], color=INK, linewidth=2)
    axes.set_yticks(range(len(rows)), [f"{record['title']} / {name}" for record, name, _ in rows], fontsize=7)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xticks([tick for tick in (0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 50, 100) if low <= tick <= high])
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    axes.set_xlabel("time of the other side / ours; thick marks are goals", color=INK)
    axes.set_title(title, fontsize=11, color=INK)
    made.savefig(path, format="png")


def _draw_time(axes: Axes, points: Sequence[Point], held: bool, look: dict[str, Any]) -> None:
    """In ms: of a run, or of each of its tokens or frames where it is a model's."""
    counts = [(record.get("frames") or record["tokens"]) if held else 1 for _, record, _ in points]
    low, middle, high = (
        [1e3 * side[key] / count for count, (_, _, side) in zip(counts, points, strict=True)]
        for key in ("quartile_low", "median", "quartile_high")
    )
    spread = [[m - x for m, x in zip(middle, low, strict=True)], [x - m for m, x in zip(middle, high, strict=True)]]
    axes.errorbar([length for length, _, _ in points], middle, spread, capsize=3, **look)


def _draw_memory(axes: Axes, points: Sequence[Point], held: bool, look: dict[str, Any]) -> None:
    if held:
        found = [(length, side["weight_bytes"] + side["state_bytes"]) for length, _, side in points]
    else:
        found = [(length, side["scratch_bytes"] / 1e6) for length, _, side in points if side["scratch_bytes"]]
    if found:
        axes.plot(*zip(*found, strict=True), **look)


def _sizes(record: Record) -> str:
    """What all of them have in common."""
    sizes = [f"{key} {value}" for key, value in record["sizes"].items() if key != "T"]
    return ", ".join([*sizes, record["dtype"], record["device"]])


def _length_axes(axes: Axes, lengths: Sequence[int], label: str, quantity: str) -> None:
    """Lengths by powers of 2, an empty context one step before the shortest."""
    positive = [length for length in lengths if length > 0]
    if len(positive) < len(lengths):
        axes.set_xscale("symlog", base=2, linthresh=positive[0] if positive else 1, linscale=1)
    else:
        axes.set_xscale("log", base=2)
    if axes.has_data():
        axes.legend(frameon=False, fontsize=9)
    axes.set_xticks(list(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tokens(int(x))))
    axes.set_xlabel(label, color=INK)
    axes.set_ylabel(quantity, color=INK)
    axes.grid(color=GRID)


def _logarithmic(axes: Axes) -> None:
    if axes.has_data():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.6g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
