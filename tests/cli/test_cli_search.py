"""`hybridvl sweep` of a search with real fits: killed and gone on with, given up early, counted in the report."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest
import sweep_runs
from sweep_runs import MIXER, swept
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hybridvl.ablation import slurm
from hybridvl.cli import main

RECIPE = """
run: {threads: 1, test: false}
trainer: {max_steps: 8, val_check_interval: 2, callbacks: [{class_path: disk_faults.Ended}]}
"""
STUDY = f"""
axes:
  lr: {{key: model.optimizer.lr, range: {{low: 1.0e-5, high: 3.0e-3, log: true}}}}
  {MIXER}
baseline: {{lr: 0.003, mixer: hybrid}}
search: {{sampler: random, trials: 2, metric: val/loss, direction: min, pruner: median, startup: 1, seed: 1}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe and a study beside each other."""
    found = tmp_path_factory.mktemp("search")
    sweep_runs.write(found, STUDY, RECIPE)
    return found


def test_a_dry_run_shows_the_space_and_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    assert main(["sweep", "study.yaml", "--dry-run", "--no-probe", "--search.trials", "7", "--jobs", "3"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("7 trials x 1 seeds, 3 at a time\n")
    assert "1.0e-05 to 0.003, by orders of magnitude" in out
    rows = [line.split("│") for line in out[out.index("the first 5 trials") :].splitlines() if line.startswith("│ 0")]
    assert [cell.strip() for cell in rows[0][1:4]] == ["0.003", "hybrid", "81,492"]
    assert len(rows) == 5
    jobs = ["--engine", "slurm", "--jobs", "2"]
    assert main(["sweep", "study.yaml", "--dry-run", "--no-probe", *jobs]) == 0
    assert capsys.readouterr().out.startswith("2 trials x 1 seeds, by 2 jobs, each with one at a time or more\n")
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_ray_is_refused(
    more: list[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert main(["sweep", "study.yaml", "--root", str(tmp_path), "--engine", "ray", *more]) == 2
    assert capsys.readouterr() == (
        "",
        "error: --engine ray: study.yaml has a search, whose trials are chosen one after another, and Ray is given all "
        "runs at once; expected --engine slurm, or local, also on several machines that share the study's folder\n",
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--search.metric", "test/exact"], "search.metric: 'test/exact'; expected the tag of a metric of the valid"),
        (["--axes.lr.key", "model.net.width"], "width: 0.003; expected a whole number"),
        (
            [
                "--search.pruner",
                "hyperband",
                "--overrides.trainer.max_steps=-1",
                "--overrides.trainer.max_time=00:01:00:00",
            ],
            "search.pruner: 'hyperband' deals out the steps of a fit, and neither trainer.max_steps nor trainer.max_ep",
        ),
        (["--axes.lr.key", "model.optimizer.rate"], "is no key of the recipe"),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    assert main(["sweep", "study.yaml", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_search_whose_jobs_died_is_not_done(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(slurm, "_GRACE", 0.5)
    jobs = ["--engine", "slurm", "--slurm.cluster", "local", "--slurm.local_setup", "[exit 3]"]
    assert main(["sweep", "study.yaml", "--root", str(tmp_path), *jobs]) == 1
    out = capsys.readouterr().out
    assert "0 of 2 done" in out
    assert "the same command goes on with the search, of which 2 runs or fewer were not begun" in out


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent was killed")
def test_a_killed_search_goes_on_and_its_trials_are_counted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    swept(folder, "--jobs", "1", status=-signal.SIGKILL, fault="pipeline SIGKILL")
    run = folder / "runs" / "study" / "lr=0.003,mixer=hybrid" / "seed_0"
    assert not (run / "metrics.json").exists()
    out = swept(folder, "--jobs", "1")
    assert "study: 1 of 2 done, 1 pruned" in out
    assert "trials       2 of 2 chosen: 1 complete, 1 pruned" in out
    start = json.loads(run.with_name("seed_0.json").read_text())
    assert start["attempts"] == 2
    assert start["arguments"][-1].endswith("checkpoints/last.ckpt")
    facts = json.loads((run / "metrics.json").read_text())
    found = facts["metrics"]["val/loss"]
    assert facts["parameters"] == 81_492  # as in the dry run
    assert f"best         val/loss {found:.4f} with lr=0.003, mixer=hybrid" in out

    # The lines that decided are what TensorBoard shows.
    lines = [json.loads(line) for line in (run / "validations.jsonl").read_text().splitlines()]
    curve = {line["step"]: line["metrics"]["val/loss"] for line in lines}
    assert list(curve) == [2, 4, 6, 8]
    assert {line["steps"] for line in lines} == {8}
    shown: dict[int, float] = {}
    for path in run.glob("events.*"):
        events = EventAccumulator(str(path))
        events.Reload()
        if "val/loss" in events.Tags()["scalars"]:
            shown |= {event.step + 1: event.value for event in events.Scalars("val/loss")}  # it counts from 0
    assert curve == pytest.approx(shown)
    assert curve[8] == facts["metrics"]["val/loss"]

    monkeypatch.chdir(folder)
    capsys.readouterr()
    assert main(["report", "runs/study"]) == 0
    assert "1 done, 1 pruned" in capsys.readouterr().out
    assert main(["sweep", "study.yaml", "--dry-run", "--no-probe"]) == 0
    assert capsys.readouterr().out.splitlines()[1:3] == out.splitlines()[-4:-2]
    report = next(folder.rglob("report.md")).read_text()
    assert "pruned: at step 2, with val/loss " in report
    assert f"lr=0.003, mixer=hybrid is best by val/loss ({found:.4g}), which chose it among 1; 2 of 2 trials" in report

    # One more trial, by a job of submitit's local executor.
    jobs = ["--engine", "slurm", "--jobs", "2", "--slurm.cluster", "local", "--slurm.timeout_min=5"]
    out = swept(folder, "--search.trials", "3", "--extend", *jobs)
    assert "trials       3 of 3 chosen: " in out
    assert "running   lr=" in out
    assert len(list((folder / "runs" / "study").glob("lr=*"))) == 3
