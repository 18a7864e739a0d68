"""`hybridvl sweep` with real fits: shared by two processes, killed and gone on with to the last bit, failed."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import cli_runs
import pytest
import sweep_runs
import torch
from sweep_runs import MIXER, swept

from hybridvl.cli import main

RECIPE = "{run: {threads: 1}, trainer: {max_steps: 8, callbacks: [{class_path: disk_faults.Ended}]}}"
STUDY = f"""
axes:
  {MIXER}
seeds: [0, 1]
metrics: [val/exact]
"""


def _write(folder: Path, study: str = STUDY) -> None:
    sweep_runs.write(folder, study, RECIPE)


def _starts(folder: Path) -> dict[str, dict[str, Any]]:
    """The start record of every run, by its place in the study's folder."""
    study = folder / "runs" / "study"
    found = {f"{path.parent.name}/{path.stem}": path for path in study.glob("*/seed_?.json")}
    return {name: json.loads(path.read_text()) for name, path in sorted(found.items())}


def _alive(folder: Path) -> list[str]:
    """Command lines of processes that work in a folder."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(place / "cwd") == str(folder):
                found.append((place / "cmdline").read_text().replace("\0", " "))
        except OSError:  # it has just ended
            continue
    return [line for line in found if line]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that two sweeps have worked on from its beginning."""
    folder = tmp_path_factory.mktemp("shared")
    _write(folder)
    both = [sweep_runs.started(folder, "--jobs", "1") for _ in range(2)]
    for process in both:
        out, _ = sweep_runs.ended(process)
        assert "study: 4 of 4 done" in out
        assert "report       hybridvl report runs/study" in out
    return folder


def test_two_sweeps_share_the_work(shared: Path) -> None:
    starts = _starts(shared)
    assert list(starts) == [f"mixer={mixer}/seed_{seed}" for mixer in ("hybrid", "window") for seed in (0, 1)]
    assert [start["attempts"] for start in starts.values()] == [1, 1, 1, 1]
    for name, start in starts.items():
        run = shared / "runs" / "study" / name
        assert start["labels"] == {"mixer": name.partition("/")[0].partition("=")[2]}
        assert json.loads((run / "metrics.json").read_text())["steps"] == 8
        log = run.with_name(f"{run.name}.log").read_text()
        assert log.count("checkpoint   ") == 1  # through to its last lines, once
        assert json.loads(run.with_name(f"{run.name}.ended.json").read_text())["status"] == 0


def test_what_is_done_is_left_alone(
    shared: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(shared)
    before = _starts(shared)
    assert main(["sweep", "study.yaml"]) == 0
    assert "4 of 4 done" in capfd.readouterr().out
    assert _starts(shared) == before


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent was killed")
def test_killed_parents_and_children_lose_nothing(shared: Path, tmp_path: Path) -> None:
    _write(tmp_path, STUDY.replace("[0, 1]", "[0]"))
    swept(tmp_path, "--jobs", "2", fault="pipeline SIGKILL", status=-signal.SIGKILL)
    until = time.monotonic() + 20
    while _alive(tmp_path) and time.monotonic() < until:
        time.sleep(0.1)
    assert _alive(tmp_path) == []
    out = swept(tmp_path, "--jobs", "2", fault="stage SIGKILL", status=1)
    assert "0 of 2 done, 2 stopped" in out
    out = swept(tmp_path, "--jobs", "2")
    assert "2 of 2 done" in out
    for name, start in _starts(tmp_path).items():
        assert start["arguments"][-1].endswith("checkpoints/last.ckpt")
        ends = [
            torch.load(folder / "runs" / "study" / name / "checkpoints" / "last.ckpt", weights_only=True)
            for folder in (shared, tmp_path)
        ]
        for end in ends:
            end["callbacks"]["Throughput"].pop("seconds")
        assert ends[0]["global_step"] == 8
        assert cli_runs.differences(*ends) == []


STRAY = """
import os
from lightning.pytorch import Callback
class Stray(Callback):
    def setup(self, trainer, pl_module, stage):
        os.write(1, b"a library says hello\\nwithout a line's end")
"""


def test_a_dry_run_measures_a_few_steps_and_leaves_nothing(tmp_path: Path) -> None:
    """Of a cell that cannot be trained it does not know how long that would take. Fits may print what they like."""
    axis = "tokens: {key: data.max_tokens, values: [8, 256]}"
    _write(tmp_path, STUDY.replace(MIXER, axis))
    recipe = tmp_path / "tiny.yaml"
    text = recipe.read_text().replace("max_steps: 8", "max_steps: 1000000")
    recipe.write_text(text.replace("disk_faults.Ended", "stray_lines.Stray"))
    (tmp_path / "stray_lines.py").write_text(STRAY)
    before = sorted(tmp_path.iterdir())
    out = swept(tmp_path, "--dry-run", "--jobs", "1")
    assert sorted(tmp_path.iterdir()) == before
    assert "4 of 4 runs to do, 1 at a time" in out
    assert re.search(r"about \d+ h \d\d min of training, and 2 runs of unknown length, by a few steps of", out)
    cells = [line.split("│") for line in out.splitlines() if line.startswith(("│ 8 ", "│ 256 "))]
    assert cells[0][-2].strip() == "?"
    assert re.fullmatch(r"\d+ h \d\d min", cells[1][-2].strip())


def test_a_signal_stops_in_order_and_failures_are_kept(tmp_path: Path) -> None:
    _write(tmp_path, STUDY.replace("[0, 1]", "[0]").replace(MIXER, "tokens: {key: data.max_tokens, values: [256, 8]}"))
    out = swept(tmp_path, "--jobs", "1", fault="pipeline SIGTERM", status=128 + signal.SIGTERM)
    assert "stopped   runs/study/tokens=256/seed_0" in out
    assert "the same command goes on" in out
    out = swept(tmp_path, status=1)
    assert "1 of 2 done, 1 failed" in out
    failed = "failed    runs/study/tokens=8/seed_0: "
    reason = next(line for line in out.splitlines() if line.startswith(failed)).removeprefix(failed)
    assert "data.max_tokens" in reason
    assert "seed_0.log" in reason
    assert _starts(tmp_path)["tokens=8/seed_0"]["attempts"] == 1
    swept(tmp_path, status=1)
    assert _starts(tmp_path)["tokens=8/seed_0"]["attempts"] == 1
    swept(tmp_path, "--retry-failed", status=1)
    assert [start["attempts"] for start in _starts(tmp_path).values()] == [2, 2]


@pytest.mark.parametrize(
    ("engine", "pace"),
    [
        (["--jobs", "3"], "3 at a time"),
        (["--engine", "slurm", "--jobs", "4"], "by 4 jobs, each with one at a time or more"),
        (["--engine", "ray"], "1 at a time or more"),
    ],
)
def test_a_dry_run_says_how_many_runs_at_a_time(
    engine: list[str],
    pace: str,
    shared: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(shared)
    assert main(["sweep", "study.yaml", "--dry-run", *engine]) == 0
    assert capsys.readouterr().out.startswith(f"0 of 4 runs to do, {pace}\n")


def test_other_settings_are_not_taken_for_the_same_run(
    shared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(shared)
    for more in ([], ["--dry-run", "--no-probe"]):
        assert main(["sweep", "study.yaml", "--overrides.model.optimizer.lr", "0.5", *more]) == 2
        printed = capsys.readouterr()
        assert "made with another study than study.yaml is now: overrides.model.optimizer.lr" in printed.err
        assert printed.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--jobs", "0"], "--jobs: 0; expected at least 1"),
        (["--cores", "2"], "--cores: 2; expected --engine ray with it"),
        (["--no-probe"], "--no-probe: expected --dry-run with it"),
        (["--seeds", "[]"], "seeds: []"),
        (["--axes.mixers.values", "[swa]"], "axes.mixers: unknown key, did you mean 'mixer'?"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _write(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "study.yaml", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()
