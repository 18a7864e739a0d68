"""recipes/tiny/progressive.yaml: its steps run, each on from the student of the one before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import hybridvl
from hybridvl.cli import main
from hybridvl.pattern import parse_pattern
from hybridvl.pipeline.description import read_pipeline
from hybridvl.pipeline.processes import Ended
from hybridvl.pipeline.runner import run_pipeline

FILE = Path(__file__).parents[2] / "recipes" / "tiny" / "progressive.yaml"
ALL = {"trainer.devices": 1, "trainer.limit_val_batches": 0, "trainer.num_sanity_val_steps": 0, "run.test": False}
ALL |= {
    "data.workers": 0,
    "data.task.init_args.train_pages": 16,
    "trainer.max_steps": 2,
    "model.optimizer.warmup_steps": 0,
}
UNTRAINED = {"lower", "windows"}  # steps whose learning rate is next to nothing, so that they end where they begin
PATTERNS = {
    "teacher": "full*8",
    "upper": "full*4 full gdn*3",
    "lower": "(full gdn*3)*2",
    "windows": "(swa gdn*3)*2",
    "logits": "(swa gdn*3)*2",
    "supervised": "(swa gdn*3)*2",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """The weights that each stage leaves after two steps."""
    changes = {"root": str(tmp_path_factory.mktemp("runs"))}
    for stage in PATTERNS:
        changes |= {f"stages.{stage}.overrides.{key}": str(value).lower() for key, value in ALL.items()}
    for stage in UNTRAINED:
        changes[f"stages.{stage}.overrides.model.optimizer.lr"] = "1e-30"
    runs = run_pipeline(read_pipeline(FILE, changes), lambda arguments: Ended(main(arguments), None), None, print)
    models = [hybridvl.load(run.model) for run in runs]
    assert [str(parse_pattern(text)) for text in PATTERNS.values()] == [model.pattern for model in models]
    return {stage: model.state_dict() for stage, model in zip(PATTERNS, models, strict=True)}


def _mixer(weights: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    place = f"decoder.layers.{layer}.mixer."
    return {name.removeprefix(place): value for name, value in weights.items() if name.startswith(place)}


def _same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two mixers are the same, but for what a learning rate of 1e-30 does to a zero."""
    return left.keys() == right.keys() and all(
        torch.allclose(left[name], right[name], rtol=0, atol=1e-20) for name in left
    )


def test_every_step_goes_on_from_the_one_before(models: dict[str, dict[str, Tensor]]) -> None:
    for layer in (5, 6, 7):
        trained = _mixer(models["upper"], layer)
        assert _same(_mixer(models["lower"], layer), trained)
        assert _same(_mixer(models["windows"], layer), trained)
        # A new mixer would hold the teacher's queries, which two steps have changed.
        assert not torch.equal(trained["q_proj.weight"], _mixer(models["teacher"], layer)["q_proj.weight"])
    for layer in (1, 2, 3):
        new, old = _mixer(models["lower"], layer), _mixer(models["upper"], layer)
        assert torch.equal(new["q_proj.weight"], old["q_proj.weight"])
        assert "A_log" in new
        assert "A_log" not in old
        assert _same(_mixer(models["windows"], layer), new)
    for layer in (0, 4):  # full attention until it gets a window
        assert _same(_mixer(models["windows"], layer), _mixer(models["teacher"], layer))


def test_the_last_stages_train_what_the_steps_left(models: dict[str, dict[str, Tensor]]) -> None:
    for before, after in (("windows", "logits"), ("logits", "supervised")):
        pairs = [(_mixer(models[before], layer), _mixer(models[after], layer)) for layer in range(8)]
        assert not any(_same(*pair) for pair in pairs)
        moved = max(float((old[name] - new[name]).abs().max()) for old, new in pairs for name in old)
        assert moved < 0.02  # two steps of AdamW, not another beginning
    frozen = [name for name in models["teacher"] if ".mixer." not in name]
    assert all(torch.equal(models["teacher"][name], models["logits"][name]) for name in frozen)
