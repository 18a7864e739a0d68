"""docs/place.md names every option of the command and every ranking, and its Python runs."""

from __future__ import annotations

import re
from pathlib import Path

import place_cases
import pytest

import hybridvl
from hybridvl.ablation.placement.measures import METRICS
from hybridvl.cli import main
from hybridvl.cli.place_search import RANKS
from hybridvl.pattern import parse_pattern

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "place.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_every_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["place", "--help"]) == 0
    options = set(re.findall(r"^  (--[\w.]+)", capsys.readouterr().out, re.MULTILINE))
    assert len(options) > 8
    assert {option for option in options if option not in PAGE and option != "--out"} == set()
    for name in (*RANKS, *METRICS, "uniform", "uniform-last", "bottom", "top"):
        assert f"`{name}`" in PAGE


def test_commands_are_those_that_there_are() -> None:
    commands = [text for kind, text in BLOCKS if kind == "bash"]
    known = {"--config", "--keep", "--seed_everything", "--rank", "--student"}
    for command in commands:
        if "hybridvl place" in command:
            assert set(re.findall(r"--[\w.]+", command)) <= known
    assert sum("hybridvl place" in command for command in commands) == 2


def test_the_example_ends_with_the_best_of_its_candidates() -> None:
    (shown,) = (text for kind, text in BLOCKS if not kind)
    rows = [re.split(" *│ *", line.strip("│ ")) for line in shown.splitlines() if line.startswith("│")]
    candidates = [row for row in rows if len(row) > 4 and "full" in row[0] and "gdn" in row[0]]
    means = [float(row[3].split()[0]) for row in candidates]
    assert len(means) >= 5
    assert means == sorted(means)
    assert shown.splitlines()[-1] == f"pattern      {candidates[0][0]}"
    for row in candidates:
        layers = parse_pattern(row[0]).layers
        assert [layer for layer, text in enumerate(layers) if text == "full"] == [int(kept) for kept in row[2].split()]


def test_the_python_runs(tmp_path: Path) -> None:
    (code,) = (text for kind, text in BLOCKS if kind == "python")
    teacher = place_cases.teacher(tmp_path / "teacher", "full*8")
    hybridvl.save(place_cases.stage(teacher, "gdn*8").net.float(), tmp_path / "student")
    names = {"teacher": teacher, "student": str(tmp_path / "student"), "batches": place_cases.batches(1, floats=32)}
    *lines, last_but_one, last = code.splitlines()
    exec("\n".join(lines), names)
    order, scores = (eval(line.partition("#")[0], names) for line in (last_but_one, last))
    assert sorted(order) == list(range(8))
    assert all(len(found) == 3 and min(found) > 0 for found in scores.values())
