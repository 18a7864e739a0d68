"""`hybridvl pipeline` with real stages: killed and resumed to the last bit, skipped, run again, refused."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cli_runs
import pytest
import torch
import yaml

from hybridvl.cli import main

FAULT = "HYBRIDVL_TEST_FAULT"
TEACHER = "{model: {net: {pattern: full*2}}, trainer: {max_steps: 4}, run: {test: false, threads: 1}}"
LAYERS = {
    "run": {"stage": "layers"},
    "model": {
        "net": None,
        "student": {"teacher": "", "pattern": "(swa gdn)", "mixers": {"swa": {"window": 16}}},
        "loss_factor": 1000.0,
    },
    "trainer": {"callbacks": [{"class_path": "disk_faults.Ended"}]},
}
PIPELINE = """
name: demo
root: runs
values: {steps: 8}
stages:
  teacher: {recipe: teacher.yaml}
  layers:
    recipe: layers.yaml
    overrides:
      model.student.teacher: ${stages.teacher.model}
      trainer.max_steps: ${values.steps}
"""


def _write(folder: Path) -> None:
    """Recipes and a pipeline of a teacher and one stage of its student."""
    cli_runs.recipe(folder, "teacher", TEACHER)
    recipe = yaml.safe_load(cli_runs.recipe(folder, "layers", TEACHER).read_text())
    vision = recipe["model"].pop("net")["vision"]
    recipe["data"]["images"] |= {key: vision[key] for key in ("patch_size", "temporal_patch_size")}
    for section, values in LAYERS.items():
        recipe[section] |= {key: value for key, value in values.items() if value is not None}
    (folder / "layers.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "pipeline.yaml").write_text(PIPELINE)


def _paths() -> str:
    """Where a stage finds the faults."""
    return os.pathsep.join([str(Path(__file__).parent), *sys.path])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", _paths())
    return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pipeline that ran without interruption."""
    folder = tmp_path_factory.mktemp("pipeline")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", _paths())
        _write(folder)
        assert main(["pipeline", "pipeline.yaml"]) == 0
    return folder


def _with_teacher(whole: Path, folder: Path) -> Path:
    """The same pipeline with nothing but its teacher done, in another folder; returns that of the student's runs."""
    for name in ("teacher.yaml", "layers.yaml", "pipeline.yaml"):
        shutil.copy(whole / name, folder)
    shutil.copytree(whole / "runs" / "demo" / "teacher", folder / "runs" / "demo" / "teacher")
    return folder / "runs" / "demo" / "layers"


def _assert_same_end(one: Path, other: Path) -> None:
    ends = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (one, other)]
    for end in ends:
        end["callbacks"]["Throughput"].pop("seconds")
    assert ends[0]["global_step"] == 8
    assert cli_runs.differences(*ends) == []
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (one, other)]
    assert weights[0] == weights[1]


def test_all_stages_run_and_then_nothing_does(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(whole)
    demo = whole / "runs" / "demo"
    assert sorted(path.name for path in demo.iterdir()) == [".lock", "layers", "teacher"]
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*") if path.is_file()}
    assert main(["pipeline", "pipeline.yaml"]) == 0
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*") if path.is_file() and path.name != ".lock"} == {
        path: time for path, time in before.items() if path.name != ".lock"
    }
    shown = capfd.readouterr().out
    assert shown.count("done") == 2
    assert "hybridvl fit" not in shown
    assert shown.splitlines()[-2:] == [
        "model        runs/demo/layers/version_0/model",
        "watch        tensorboard --logdir runs/demo",
    ]


def test_a_stage_killed_by_the_kernel_goes_on_to_the_same_bits(
    whole: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    layers = _with_teacher(whole, here)
    monkeypatch.setenv(FAULT, "stage SIGKILL")
    assert main(["pipeline", "pipeline.yaml"]) == 128 + signal.SIGKILL
    told = capfd.readouterr().err.splitlines()[-1]
    checkpoint = "runs/demo/layers/version_0/checkpoints/last.ckpt"
    assert told.startswith("error: stage 'layers' was ended by SIGKILL, perhaps for want of memory")
    assert f"the same command goes on from {checkpoint}; with other recipes" in told
    assert not (layers / "version_0" / "model").exists()
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 4

    monkeypatch.delenv(FAULT)
    assert main(["pipeline", "pipeline.yaml"]) == 0
    assert sorted(path.name for path in layers.iterdir()) == ["version_0", "version_0.json"]
    _assert_same_end(whole / "runs" / "demo" / "layers" / "version_0", layers / "version_0")
    capfd.readouterr()
    assert main(["pipeline", "pipeline.yaml", "--dry-run"]) == 0
    assert capfd.readouterr().out.count("done") == 2


def test_sigterm_ends_the_stage_in_order_and_the_pipeline_with_143(whole: Path, here: Path) -> None:
    layers = _with_teacher(whole, here)
    done = subprocess.run(
        [sys.executable, "-m", "hybridvl", "pipeline", "pipeline.yaml"],
        env={**os.environ, FAULT: "pipeline SIGTERM"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        "error: stage 'layers' was interrupted; the same command goes on from"
    )
    assert not (layers / "version_0" / "done.json").exists()
    assert (layers / "version_0" / "checkpoints" / "last.ckpt").is_file()


def test_a_changed_stage_is_checked_and_would_run_as_a_new_version(
    whole: Path, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    layers = _with_teacher(whole, here)
    shutil.copytree(whole / "runs" / "demo" / "layers", layers)
    assert main(["pipeline", "pipeline.yaml", "--values.steps", "9", "--dry-run"]) == 0
    shown = capfd.readouterr().out
    assert "runs/demo/layers/version_1" in shown
    assert "its recipe, overrides or source changed" in shown
    assert [path.name for path in layers.iterdir() if path.is_dir()] == ["version_0"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--stages.layers.overrides.model.lss mse", "model.lss: unknown key, did you mean 'model.loss'?"),
        ("--stages.layers.overrides.trainer.max_steps many", "trainer.max_steps: Expected int. Got value: many"),
        ("--stages.teacher.overrides.trainer.max_steps -1", "stages.teacher: trainer.max_steps: not set"),
        ("--stages.layers.overrides.run.stage lyers", "stages.layers: run.stage: 'lyers'; expected one of supervised"),
        ("--stages.layer.overrides.run.test false", "stages.layer: unknown key, did you mean 'layers'?"),
        ("--values.step 3", "values.step: unknown key, did you mean 'steps'?"),
        ("--from student", "--from: no stage is called 'student'; the stages are teacher, layers"),
        ("--values.steps", "--values.steps: expected a value after it"),
        ("--form teacher", "unrecognized arguments: --form teacher"),
    ],
)
def test_mistakes_are_found_before_any_stage_runs(
    flags: str, message: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _write(here)
    assert main(["pipeline", "pipeline.yaml", *flags.split()]) == 2
    shown = capfd.readouterr()
    assert shown.err.startswith("error: ")
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert "hybridvl fit" not in shown.out
    assert not (here / "runs").exists()


def test_a_file_that_is_not_there(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["pipeline", "nowhere.yaml"]) == 2
    assert capfd.readouterr().err == "error: nowhere.yaml: cannot be read: No such file or directory\n"


def test_a_stage_that_is_refused_names_itself(whole: Path, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    layers = _with_teacher(whole, here)
    flags = ["--stages.layers.overrides.model.student.pattern", "(swa gdn)*2"]
    assert main(["pipeline", "pipeline.yaml", *flags]) == 2
    first, *_, last = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "model.student" in first
    assert last.startswith("error: stage 'layers' failed with exit status 2, for the reason above; once that is mended")
    assert list(layers.iterdir()) == []
