"""`hybridvl compare`: what differs between runs, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_runs import recipe, write_run

from hybridvl.ablation.report.comparison import compare_runs
from hybridvl.cli import main


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    first, second = recipe(0), recipe(1, pattern="swa*3")
    second["model"]["optimizer"] = {"lr": 0.01, "betas": [0.9, 0.98]}
    first["run"]["root"], second["run"]["root"] = "here", "there"
    return [
        write_run(tmp_path / "a" / "version_0", first, {"test/exact": 0.5, "val/loss": 1.5}),
        write_run(tmp_path / "b" / "version_0", second, {"test/exact": 0.75}),
    ]


def test_settings_and_metrics_side_by_side(runs: list[Path]) -> None:
    found = compare_runs(runs)
    assert found.names == ["a", "b"]
    assert found.settings == {
        "seed_everything": ["0", "1"],
        "data.seed": ["0", "1"],
        "model.net.pattern": ["gdn*2 swa", "swa*3"],
        "model.optimizer.lr": ["0.003", "0.01"],
        "model.optimizer.betas": ["-", "[0.9, 0.98]"],
    }
    assert found.metrics == {"test/exact": [0.5, 0.75], "val/loss": [1.5, None]}
    assert found.outcomes["status"] == ["done", "done"]
    assert found.outcomes["parameters"] == ["1,234", "1,234"]


def test_names_are_as_short_as_they_can_be(tmp_path: Path) -> None:
    folders = [tmp_path / "x" / name for name in ("version_0", "version_1")] + [tmp_path / "y" / "version_0"]
    for folder in folders:
        write_run(folder, recipe(0), {"test/exact": 0.5})
    assert compare_runs(folders).names == ["x/version_0", "x/version_1", "y/version_0"]
    assert compare_runs(folders[:2]).names == ["version_0", "version_1"]
    assert compare_runs([folders[0], folders[0]]).names == ["version_0", "version_0"]


def test_the_tables(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *map(str, runs)]) == 0
    lines = [" ".join(line.strip("│┃ ").split()) for line in capsys.readouterr().out.splitlines()]
    assert "model.net.pattern │ gdn*2 swa │ swa*3" in lines
    assert "test/exact │ 0.500 │ 0.750 │ +0.250" in lines
    assert "val/loss │ 1.500 │ - │ -" in lines


def test_runs_of_equal_recipes(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(runs[0]), str(runs[0]), str(runs[0])]) == 0
    shown = capsys.readouterr().out
    assert "the recipes differ in nothing" in shown
    assert "difference" not in shown


def test_as_json(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *map(str, runs), "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == [str(run) for run in runs]
    assert found["metrics"]["val/loss"] == [1.5, None]
    assert found["settings"]["model.net.pattern"] == ["gdn*2 swa", "swa*3"]


def test_mistakes(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (runs[1] / "config.yaml").write_text("model: [")
    for arguments, message in [
        ([runs[0]], "one run; expected at least two to compare"),
        ([runs[0], tmp_path / "nowhere"], "nowhere: no such folder; expected a run folder"),
        ([runs[0], tmp_path / "empty"], "empty: no config.yaml in it; expected a run folder\n"),
        ([runs[0], runs[0].parent], f"expected a run folder; there are {runs[0]}\n"),
        ([runs[0], runs[1]], f"{runs[1]}: config.yaml: cannot be read: "),
    ]:
        assert main(["compare", *map(str, arguments)]) == 2
        shown = capsys.readouterr()
        assert message in shown.err
        assert "Traceback" not in shown.err
        assert shown.out == ""
