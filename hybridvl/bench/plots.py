"""Pictures of records: cost against length, ours and peers, and the ratios of a suite with their goals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator, ScalarFormatter

from hybridvl.bench.report import Record
from hybridvl.pictures import GRID, INK, default_style, figure
from hybridvl.plan.units import tokens

_COLOURS = ("#2f6690", "#c8553d", "#e9a23b", "#3a9679", "#7d5ba6", "#6b705c")


@default_style()
def draw_growth(records: Sequence[Record], letter: str, title: str, path: Path) -> None:
    """Write a PNG: time with its quartiles, and scratch memory where it was measured, against the size `letter`."""
    made = figure(11, 4.6)
    made.suptitle(title, fontsize=11, color=INK)
    time, memory = made.subplots(1, 2)
    lengths = sorted({int(record["sizes"][letter]) for record in records})
    several = len({record["direction"] for record in records}) > 1
    lines: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for record in records:
        for side in record["sides"]:
            name = f"{side['name']}, {record['direction']}" if several else side["name"]
            lines.setdefault(name, []).append((record["sizes"][letter], side))
    for index, (name, points) in enumerate(lines.items()):
        at, sides = [length for length, _ in points], [side for _, side in points]
        middle = [1e3 * side["median"] for side in sides]
        spread = (
            [1e3 * (side["median"] - side["quartile_low"]) for side in sides],
            [1e3 * (side["quartile_high"] - side["median"]) for side in sides],
        )
        colour = _COLOURS[index % len(_COLOURS)]
        time.errorbar(at, middle, spread, marker="o", markersize=4, capsize=3, color=colour, label=name)
        held = [(length, side["scratch_bytes"] / 1e6) for length, side in points if side["scratch_bytes"]]
        if held:
            memory.plot(*zip(*held, strict=True), marker="o", markersize=4, color=colour, label=name)
    _length_axes(time, lengths, "ms")
    _length_axes(memory, lengths, "MB of memory beside the results")
    made.savefig(path, format="png")


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


def _length_axes(axes: Axes, lengths: Sequence[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    if axes.has_data():
        axes.set_yscale("log")
        axes.legend(frameon=False, fontsize=9)
    axes.set_xticks(list(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tokens(int(x))))
    axes.set_xlabel("tokens", color=INK)
    axes.set_ylabel(label, color=INK)
    axes.grid(color=GRID)
