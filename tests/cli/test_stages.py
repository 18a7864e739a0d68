"""`run.stage` on the command line: a teacher trained on digits, distilled, exported, loaded, and tuned."""

from __future__ import annotations

import json
from pathlib import Path

import cli_runs
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import hybridvl
from hybridvl.cli import main
from hybridvl.cli.stages import STAGES, stage_class, stage_name

FLAGS = [
    *("--model.match", "mixer", "--model.student.mixers.gdn.expand_v", "1.0"),
    *("--checkpoints.monitor", "val/loss", "--checkpoints.mode", "min"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of a teacher and of its student."""
    root = tmp_path_factory.mktemp("stages")
    teacher = cli_runs.recipe(root, "teacher")
    assert main(["fit", "--config", str(teacher), "--model.net.pattern", "full*4"]) == 0
    student = {"teacher": str(model(root, "teacher")), "pattern": "(swa gdn)*2", "mixers": {"swa": {"window": 8}}}
    layers = cli_runs.stage_recipe(root, "layers", {"student": student, "loss": "relative_mse"})
    flags = [
        "--model.match",
        "mixer",
        "--model.student.mixers.gdn.expand_v",
        "1.0",
        "--checkpoints.monitor",
        "val/loss",
    ]
    assert main(["fit", "--config", str(layers), *flags, "--checkpoints.mode", "min"]) == 0
    return root


def run(root: Path, name: str) -> Path:
    return root / "runs" / name / "version_0"


def model(root: Path, name: str) -> Path:
    return run(root, name) / "model"


def test_a_distilled_student_is_a_model_folder(root: Path) -> None:
    teacher, student = (hybridvl.load(model(root, name)) for name in ("teacher", "layers"))
    metrics = json.loads((run(root, "layers") / "metrics.json").read_text())
    assert student.pattern == metrics["pattern"] == "(swa gdn)*2"
    assert [config.name for config in student.mixer_configs] == ["swa", "gdn"] * 2
    assert (student.mixer_configs[0].window, student.mixer_configs[1].expand_v) == (8, 1.0)
    own, theirs = student.state_dict(), teacher.state_dict()
    kept = [name for name in own if ".mixer." not in name]
    assert all(torch.equal(own[name], theirs[name]) for name in kept)
    assert len(kept) > 20
    trained = sum(value.numel() for name, value in own.items() if ".mixer." in name)
    assert (metrics["trainable_parameters"], metrics["parameters"]) == (trained, student.num_params)
    assert {"val/loss", "val/layer_0", "val/layer_3", "train/loss", "test/exact"} < set(metrics["metrics"])
    assert (model(root, "layers") / "tokenizer.json").is_file()


def test_tensorboard_tells_stages_and_inheritance_apart(root: Path) -> None:
    found = []
    for name in ("teacher", "layers"):
        events = EventAccumulator(str(min(run(root, name).glob("events.*"))))
        events.Reload()
        content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        found.append(HParamsPluginData.FromString(content).session_start_info.hparams)
    assert found[0]["stage"].string_value == "supervised"
    assert "inherit" not in found[0]
    expected = {"stage": "layers", "inherit": "qkvo", "loss": "relative_mse", "match": "mixer"}
    assert {name: found[1][name].string_value for name in expected} == expected


def test_the_saved_recipe_says_the_stage(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(root, "layers")
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert (saved["run"]["stage"], saved["model"]["match"]) == ("layers", "mixer")
    assert saved["model"]["student"]["mixers"] == {"swa": {"window": 8}, "gdn": {"expand_v": 1.0}}
    assert main(["validate", "--config", str(folder / "config.yaml"), "--ckpt_path", "best"]) == 0
    again = json.loads((folder / "metrics.json").read_text())["metrics"]
    assert f"score        val/loss {again['val/loss']:.4f}" in capsys.readouterr().out
    assert main(["test", "--config", str(folder / "config.yaml"), "--ckpt_path", "last"]) == 0


def test_a_killed_distillation_goes_on_to_the_last_bit(root: Path, tmp_path: Path) -> None:
    again = ["fit", "--config", str(root / "layers.yaml"), *FLAGS, "--run.root", str(tmp_path)]
    again += ["--model.optimizer.total_steps", "12"]
    assert main([*again, "--trainer.max_steps", "8"]) == 0
    assert main([*again, "--ckpt_path", "last"]) == 0
    folders = run(root, "layers"), tmp_path / "layers" / "version_0"
    ends = [torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in folders]
    for part in ("state_dict", "optimizer_states"):
        assert cli_runs.differences(ends[0][part], ends[1][part]) == [], part
    assert set(ends[0]["state_dict"]) == {f"net.{name}" for name in hybridvl.load(model(root, "layers")).state_dict()}


def test_tuning_starts_from_a_folder_and_takes_its_model(root: Path) -> None:
    source = model(root, "layers")
    tuned = cli_runs.stage_recipe(
        root, "supervised", {"source": str(source), "train_only": ["mixers:gdn"]}, name="tuned"
    )
    assert main(["fit", "--config", str(tuned), "--model.net.activation_checkpointing", "true"]) == 0
    saved = yaml.safe_load((run(root, "tuned") / "config.yaml").read_text())
    assert saved["model"]["net"]["pattern"] == "(swa gdn)*2"
    assert saved["model"]["net"]["activation_checkpointing"] is True
    before, after = (hybridvl.load(folder).state_dict() for folder in (source, model(root, "tuned")))
    changed = {name.rpartition(".mixer.")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder.layers.1", "decoder.layers.3"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--run.stage", "layer"], "run.stage: 'layer'; expected one of supervised, layers, logits"),
        (["--model.student.teacher", "gone"], "model.student.teacher: gone: no such folder"),
        (["--model.student.pattern", "gdn*3"], "3 layers; expected 4"),
        (["--model.student.pattern", "full*4"], "model.student.pattern: 'full*4' has no layer that differs"),
        (["--model.student.inherit", "all"], "model.student.inherit"),
        (["--model.student.patern", "x"], "model.student.patern: unknown key, did you mean 'model.student.pattern'?"),
        (["--model.freeze", "[mixers:full]"], "model.freeze: no parameter is called 'mixers:full'"),
        (["--model.losss", "mse"], "model.losss: unknown key, did you mean 'model.loss'?"),
        (["--run.stage=supervised"], "unknown key"),
    ],
)
def test_mistakes_are_explained(
    flags: list[str], message: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = {"teacher": str(model(root, "teacher")), "pattern": "(swa gdn)*2"}
    path = cli_runs.stage_recipe(tmp_path, "layers", {"student": student})
    try:
        status = main(["fit", "--config", str(path), *flags])
    except SystemExit as left:
        status = left.code
    printed = capsys.readouterr().err
    assert status == 2
    assert printed.startswith("error: ")
    assert message in printed.splitlines()[0]
    assert not (tmp_path / "runs").exists()


def test_a_source_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = cli_runs.stage_recipe(tmp_path, "supervised", {"source": "gone"})
    assert main(["fit", "--config", str(path)]) == 2
    assert "error: model.source: gone: no such folder" in capsys.readouterr().err


def test_the_last_word_on_the_stage_counts(tmp_path: Path) -> None:
    one, other = (tmp_path / f"{name}.yaml" for name in ("one", "other"))
    one.write_text("seed: layers\nrun: {stage: '${seed}'}")
    other.write_text("run: {name: x}")
    assert stage_name([], []) == stage_name([], [other]) == "supervised"
    assert stage_name([], [one, other]) == "layers"
    assert stage_name(["--run.stage", "supervised"], [one]) == "supervised"
    assert stage_name(["--run.stage=layers"], []) == "layers"


def test_every_stage_has_its_module() -> None:
    assert [stage_class(name).__name__ for name in STAGES] == [
        "SupervisedTuning",
        "LayerDistillation",
        "LogitDistillation",
    ]
