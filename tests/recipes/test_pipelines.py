"""Every pipeline of recipes/: its stages are parsed and built without memory, each from the one before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from recipe_builds import build, pair_of_configurations

from hybridvl.checkpoints.formats import FORMATS
from hybridvl.checkpoints.saving import config_values
from hybridvl.cli import main
from hybridvl.cli.training import TrainingCLI
from hybridvl.models.config import ModelConfig
from hybridvl.pipeline.description import read_pipeline
from hybridvl.pipeline.runner import fit_arguments, plan_steps
from hybridvl.training import layer_distillation, logit_distillation, supervised

ROOT = Path(__file__).parents[2]
RECIPES = {
    str(path.relative_to(ROOT / "recipes")): path
    for path in sorted(ROOT.glob("recipes/*/*.yaml"))
    if path.parent.name != "probes"  # which no pipeline uses
}
PIPELINES = [name for name, path in RECIPES.items() if "stages" in yaml.safe_load(path.read_text())]
PUBLISHED = ROOT / "tests" / "data" / "qwen2_5_vl_published" / "3B.json"


@pytest.fixture
def weightless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules that read no weights."""
    for module in (layer_distillation, logit_distillation):
        monkeypatch.setattr(module, "build_pair", pair_of_configurations)
    monkeypatch.setattr(supervised, "load_weights", lambda model, folder: None)


def _stages(pipeline: str, root: Path, *flags: str, **changes: str) -> dict[str, TrainingCLI]:
    """Every stage, built from the configurations that the earlier ones leave."""
    described = read_pipeline(RECIPES[pipeline], {"root": str(root), **changes})
    steps = plan_steps(described)
    built = {}
    for number, step in enumerate(steps):
        cli = build(*fit_arguments(described, step, steps[:number])[1:], *flags)
        _write(cli.model.config, step.run.model)
        built[step.stage.name] = cli
    return built


def _write(config: ModelConfig, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_values(FORMATS["hybridvl"], config)))


def _trained(cli: TrainingCLI) -> set[str]:
    return {name for name, parameter in cli.model.net.named_parameters() if parameter.requires_grad}


def test_every_file_is_a_pipeline_or_a_recipe_of_one() -> None:
    used = {
        path.resolve() for name in PIPELINES for stage in read_pipeline(RECIPES[name]).stages for path in stage.recipes
    }
    assert set(PIPELINES) == {
        *("tiny/infinitevl.yaml", "tiny/long.yaml", "tiny/progressive.yaml", "tiny/recall.yaml", "tiny/scratch.yaml"),
        *("infinitevl/v1.yaml", "infinitevl/v2_base.yaml"),
    }
    assert {path.resolve() for name, path in RECIPES.items() if name not in PIPELINES} == used


@pytest.mark.parametrize("pattern", ["(swa gdn*3)*2", "gdn*8", "mamba2*8", "(full gdn*3)*2"])
def test_the_tiny_stages(pattern: str, tmp_path: Path, weightless: None) -> None:
    stages = _stages("tiny/infinitevl.yaml", tmp_path, **{"values.pattern": pattern, "values.seed": "3"})
    assert list(stages) == ["teacher", "layers", "logits", "supervised"]
    assert [cli.config.fit.seed_everything for cli in stages.values()] == [3] * 4
    assert [cli.datamodule.seed for cli in stages.values()] == [3] * 4
    assert stages["teacher"].model.config.pattern == "full*8"
    assert {stages[name].model.config.pattern for name in ("layers", "logits", "supervised")} == {pattern}
    new = {name for name in _trained(stages["layers"]) if ".mixer." in name}
    assert new == _trained(stages["layers"]) == _trained(stages["logits"])
    tuned = _trained(stages["supervised"])
    assert not [name for name in tuned if name.startswith(("visual.", "decoder.embed_tokens."))]
    assert {name for name, _ in stages["supervised"].model.net.named_parameters() if "decoder.layers." in name} <= tuned
    # The student has at most a fifth of the teacher's training.
    samples = {name: cli.trainer.max_steps * cli.config.fit.data.batch_size for name, cli in stages.items()}
    assert 5 * (sum(samples.values()) - samples["teacher"]) <= samples["teacher"]


def test_the_model_from_scratch_is_the_student(tmp_path: Path, weightless: None) -> None:
    for pattern in ("(swa gdn*3)*2", "mamba2*8"):
        of_pattern = {"values.pattern": pattern}
        student = _stages("tiny/infinitevl.yaml", tmp_path / "student" / pattern[:3], **of_pattern)
        (scratch,) = _stages("tiny/scratch.yaml", tmp_path / "scratch" / pattern[:3], **of_pattern).values()
        assert scratch.model.net.num_params == student["supervised"].model.net.num_params
        assert scratch.model.net.mixer_configs == student["supervised"].model.net.mixer_configs
        trained = [cli for name, cli in student.items() if name != "teacher"]
        assert scratch.trainer.max_steps == sum(cli.trainer.max_steps for cli in trained)
        assert {scratch.config.fit.data.batch_size} == {cli.config.fit.data.batch_size for cli in trained}


@pytest.mark.parametrize(
    ("pipeline", "pattern", "replaced"),
    [("infinitevl/v1.yaml", "(swa gdn*3)*9", 36), ("infinitevl/v2_base.yaml", "(full gdn*3)*9", 27)],
)
def test_the_published_sizes(pipeline: str, pattern: str, replaced: int, tmp_path: Path, weightless: None) -> None:
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    shutil.copy(PUBLISHED, teacher / "config.json")
    flags = ("--data.tokenizer", "builtin", "--trainer.accelerator", "cpu", "--trainer.devices", "1")
    stages = _stages(pipeline, tmp_path, *flags, **{"values.teacher": str(teacher)})
    assert list(stages) == ["layers", "logits", "supervised", "context"]
    for cli in stages.values():
        net = cli.model.net
        adapted = sum(parameter.numel() for name, parameter in net.named_parameters() if ".lora_" in name)
        assert (net.pattern, net.num_params - adapted) == (pattern, 4_408_381_536)
        assert {parameter.device.type for parameter in net.parameters()} == {"meta"}
        assert {config.window for config in net.mixer_configs if config.name == "swa"} <= {8192}
        images, vision = cli.datamodule.images.config, net.config.vision
        assert (images.patch_size, images.merge_size) == (vision.patch_size, vision.spatial_merge_size)
        assert cli.trainer.accumulate_grad_batches == 8
    first, second, third, fourth = stages.values()
    assert first.model.teacher.num_params == 3_754_622_976
    layers = {name.split(".")[2] for name in _trained(first)}
    assert len(layers) == replaced
    assert all(".mixer." in name for name in _trained(first))
    assert _trained(second) == _trained(first)
    assert (first.model.loss_factor, second.model.temperature) == (1000.0, 2.0)
    frozen = {name for name, _ in third.model.net.named_parameters()} - _trained(third)
    assert {name.split(".")[0] for name in frozen} == {"visual", "decoder"}
    assert [name for name in frozen if name.startswith("decoder")] == ["decoder.embed_tokens.weight"]
    mixture = third.datamodule.task
    weights = {name: part.weight for name, part in mixture.parts.items()}
    assert sorted(weights.values()) == [0.78, 1.56, 10.5, 11.6, 11.9, 11.9, 16.4, 35.4]
    assert (mixture.samples, third.datamodule.max_tokens, third.datamodule.images.config.max_pixels) == (
        *(8_000_000, 8192, 1344**2),
    )
    assert first.datamodule.task.samples == second.datamodule.task.samples == 1_000_000

    trained = _trained(fourth)
    assert trained
    assert all(".mixer." in name and ".lora_" in name for name in trained)
    assert {int(name.split(".")[2]) for name in trained} == set(range(36))
    # rank * (in + out): queries, keys, values and output of attention; those, the gate, decay and rate of the others.
    width, rank = 2048, 64
    attention = 2 * (width + 2048) + 2 * (width + 256)
    gdn = 2 * (width + 2048) + 3 * (width + 4096) + 2 * (width + 16)
    assert sum(fourth.model.net.get_parameter(name).numel() for name in trained) == rank * 9 * (attention + 3 * gdn)
    assert (fourth.datamodule.max_tokens, fourth.datamodule.task.samples) == (32_768, 1_000_000)
    assert fourth.model.config.activation_checkpointing


def test_the_tiny_stages_of_long_streams(tmp_path: Path, weightless: None) -> None:
    stages = _stages("tiny/long.yaml", tmp_path, **{"values.seed": "3"})
    assert list(stages) == ["frames", "context"]
    short, long = (cli.datamodule for cli in stages.values())
    assert long.task.frames[0] == long.task.frames[1] == 32 * short.task.frames[1]
    assert short.task.items == long.task.items
    assert [cli.datamodule.seed for cli in stages.values()] == [3, 3]
    assert all(".mixer." in name and ".lora_" in name for name in _trained(stages["context"]))
    for cli in stages.values():
        sample = cli.datamodule.source("test").sample(0, 0)
        assert len(cli.datamodule._encoder()(sample)) <= cli.datamodule.max_tokens


def test_the_longest_streams_follow_the_long_ones(tmp_path: Path, weightless: None) -> None:
    long = _stages("tiny/long.yaml", tmp_path / "long", **{"values.seed": "3"})
    stages = _stages("tiny/recall.yaml", tmp_path / "recall", **{"values.seed": "3"})
    assert list(stages) == [*long, "reach"]
    for name, cli in long.items():
        assert vars(cli.datamodule.task) == vars(stages[name].datamodule.task)
        assert cli.model.config == stages[name].model.config
    reach, context = stages["reach"], stages["context"]
    assert reach.datamodule.task.frames == (512, 512)
    assert _trained(reach) == _trained(context)
    sample = reach.datamodule.source("train").sample(0, 0)
    assert len(reach.datamodule._encoder()(sample)) <= reach.datamodule.max_tokens


@pytest.mark.parametrize(
    "pipeline",
    ["tiny/infinitevl.yaml", "tiny/long.yaml", "tiny/progressive.yaml", "tiny/recall.yaml", "infinitevl/v1.yaml"],
)
def test_the_command_line_accepts_a_pipeline(pipeline: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["pipeline", str(RECIPES[pipeline]), "--root", str(tmp_path / "runs"), "--dry-run"]) == 0
    shown = capfd.readouterr()
    assert shown.err == ""
    assert shown.out.count("to run") == len(read_pipeline(RECIPES[pipeline]).stages)
    assert list(tmp_path.iterdir()) == []
