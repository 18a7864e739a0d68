"""The page of the claims tells what its two files of results come to."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

FOLDER = Path(__file__).parents[2] / "docs" / "benchmarks"
PAGE = (FOLDER / "claims.md").read_text(encoding="utf-8")
CELLS = {
    "the last frame: above guessing by": ("recall,window", "test/lag_1_exact", 0.1, None),
    "frames 17 to 32 ago: above guessing by": ("recall,window", "test/lag_17_32_exact", 0.1, None),
    "whole pages, linear minus hybrid": ("pages,linear", "test/exact", 0, "pages,hybrid"),
    "pages of 9 to 16 digits, linear minus hybrid": ("pages,linear", "test/digits_9_16_exact", 0, "pages,hybrid"),
    "frames 17 to 32 ago, hybrid": ("recall,hybrid", "test/lag_17_32_exact", 0, None),
    "whole pages, hybrid minus full attention": ("pages,hybrid", "test/exact", 0, "pages,full"),
}


def values(name: str, cell: str, metric: str) -> dict[int, float]:
    """By seed."""
    task, layers = cell.split(",")
    runs = json.loads((FOLDER / name).read_text(encoding="utf-8"))["runs"]
    place = f"task={task},layers={layers}/"
    return {run["seed"]: run["metrics"][metric] for run in runs if place in run["folder"]}


def told(found: list[float], confidence: float = 0.95) -> str:
    low, high = stats.t.interval(confidence, len(found) - 1, np.mean(found), stats.sem(found))
    return f"{np.mean(found):.3f} [{low:.3f}, {high:.3f}]"


def parts(names: list[str], cell: str, metric: str, guessing: float, than: str | None) -> list[float]:
    own, other = ({s: x for name in names for s, x in values(name, c, metric).items()} for c in (cell, than or cell))
    return [own[seed] - (other[seed] if than else guessing) for seed in own]


@pytest.mark.parametrize("what", CELLS)
def test_intervals_of_four_and_of_eight_seeds(what: str) -> None:
    first, second = "claims-seeds-11-14.json", "claims.json"
    rows = [line for line in PAGE.splitlines() if f"| {what}" in line]
    counts = [len(parts(names, *CELLS[what])) for names in ([second], [first], [first, second])]
    assert counts == [4, 4, 8]
    assert [told(parts([second], *CELLS[what])) in row for row in rows] == [True, False]
    both = f"| {told(parts([first], *CELLS[what]))} | {told(parts([first, second], *CELLS[what]))} |"
    assert [row.endswith(both) for row in rows] == [False, True]


def test_the_second_look() -> None:
    found = parts(["claims-seeds-11-14.json", "claims.json"], *CELLS["whole pages, linear minus hybrid"])
    page = " ".join(PAGE.split())
    (reaches,) = re.findall(r"with intervals at 97\.5 % all parts hold but one, [^.;]*?reach up to (-?[\d.]+\d)", page)
    assert told(found, 0.975).endswith(f" {reaches}]")
