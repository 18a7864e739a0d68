"""Every file of ablations/: read, expanded, its budgets matched, and the model of each cell built without memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from recipe_builds import build, pair_of_configurations

from hybridvl.ablation.cells import baseline_of, cells, runs
from hybridvl.ablation.claims import read_claims
from hybridvl.ablation.matching import match_cells
from hybridvl.ablation.recipes import recipe_model
from hybridvl.ablation.study import Study, read_study
from hybridvl.checkpoints.formats import FORMATS
from hybridvl.checkpoints.saving import config_values
from hybridvl.models.config import ModelConfig
from hybridvl.models.vlm import VisionLanguageModel
from hybridvl.pattern import parse_pattern
from hybridvl.pipeline.mappings import read_mapping
from hybridvl.training import layer_distillation
from hybridvl.training.agreement import check_agreement

ROOT = Path(__file__).parents[2]
FILES = {str(path.relative_to(ROOT / "ablations")): path for path in sorted(ROOT.glob("ablations/**/*.yaml"))}
STUDIES = [name for name, path in FILES.items() if "axes" in read_mapping(path)]
KINDS = ("ratio", "window", "mixer", "placement", "inherit", "claims")
PUBLISHED = ROOT / "tests" / "data" / "qwen2_5_vl_published" / "3B.json"


def _teacher(name: str, folder: Path) -> Path:
    """The folder of a student's teacher, without weights."""
    folder.mkdir()
    if name.startswith("full/"):
        shutil.copy(PUBLISHED, folder / "config.json")
        return folder
    net = read_mapping(ROOT / "recipes" / "tiny" / "teacher.yaml")["model"]["net"]
    config = ModelConfig.from_dict(net)
    (folder / "config.json").write_text(json.dumps(config_values(FORMATS["hybridvl"], config)))
    return folder


def _read(name: str, folder: Path) -> Study:
    """A study of ablations/; one that needs a teacher gets it."""
    needs = "teacher" in read_mapping(FILES[name]).get("values", {})
    return read_study(FILES[name], {"values.teacher": str(_teacher(name, folder / "teacher"))} if needs else {})


def test_each_kind_is_there_tiny_and_in_full() -> None:
    assert set(STUDIES) >= {f"{folder}{kind}.yaml" for folder in ("", "full/") for kind in KINDS}
    recipes = {path.resolve() for name in STUDIES for path in read_study(FILES[name]).recipes}
    assert {FILES[name].resolve() for name in FILES.keys() - set(STUDIES)} <= recipes
    assert len({read_study(FILES[name]).folder for name in STUDIES}) == len(STUDIES)


@pytest.mark.parametrize("name", STUDIES)
def test_budgets_are_those_of_built_models(name: str, tmp_path: Path) -> None:
    study = _read(name, tmp_path)
    assert len(study.seeds) >= 3
    assert study.metrics
    found = cells(study)
    matched = match_cells(study, found)
    recipes = [read_mapping(path) for path in study.recipes]
    params: dict[str, int] = {}
    built: dict[tuple[object, ...], int] = {}  # no parameter depends on the order of layers or on their windows
    for entry in matched:
        net = recipe_model(recipes, entry.cell.overrides)
        kind = (net.mlp_width, *sorted(parse_pattern(net.pattern).layers))
        if kind not in built:
            with torch.device("meta"):
                built[kind] = VisionLanguageModel(net).num_params
        params[entry.cell.name] = built[kind]
        assert entry.costs is not None
        assert entry.costs.params == params[entry.cell.name]
        assert not entry.unknown
    if "params" in [match.budget for match in study.matches]:
        for cell in found:
            baseline = baseline_of(study, found, cell)
            assert baseline is not None
            assert abs(params[cell.name] / params[baseline.name] - 1) <= 0.005


@pytest.mark.parametrize("task", ["recall", "pages"])
def test_the_sides_of_the_claims_hold_equally_much(task: str) -> None:
    """Of a model's state, and of its parameters, as claims.yaml says; full attention is there for comparison."""
    study = read_study(FILES["claims.yaml"])
    found = {
        entry.cell.labels["layers"]: entry.costs
        for entry in match_cells(study, cells(study))
        if entry.cell.labels["task"] == task
    }
    costs = [found[layers] for layers in ("hybrid", "linear", "window")]
    states = [cost.state_bytes for cost in costs if cost is not None]
    params = [cost.params for cost in costs if cost is not None]
    assert len(states) == 3
    assert max(states) <= 1.005 * min(states)
    assert max(params) <= 1.005 * min(params)
    # Keys and values of 40 numbers in float32, of 35 tokens in each of two layers.
    assert states[2] == pytest.approx(2 * 35 * 2 * 40 * 4, rel=0.005)


def test_the_report_of_the_claims_measures_their_lengths() -> None:
    claims = read_claims(list(read_study(FILES["claims.yaml"]).claims))
    (lengths,) = {part.tokens for claim in claims for part in claim.parts if part.tokens is not None}
    command = f"hybridvl report runs/claims --latency {lengths[0]} {lengths[1]}\n"
    for path in (FILES["claims.yaml"], ROOT / "docs" / "report.md"):
        assert command in path.read_text()


@pytest.mark.parametrize("name", [*(f"{kind}.yaml" for kind in KINDS), "full/mixer.yaml", "full/inherit.yaml"])
def test_the_command_line_builds_the_same_models(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last cell, as `hybridvl fit` builds it."""
    monkeypatch.setattr(layer_distillation, "build_pair", pair_of_configurations)
    study = _read(name, tmp_path)
    matched = match_cells(study, cells(study))[-1]
    (run, *_) = runs(study, [matched.cell])
    flags = ("--data.tokenizer", "builtin", "--trainer.accelerator", "cpu", "--trainer.devices", "1")
    built = build(*run.arguments[1:], *(flags if name.startswith("full/") else ()))
    assert matched.costs is not None
    assert built.model.net.num_params == matched.costs.params
    assert {parameter.device.type for parameter in built.model.net.parameters()} == {"meta"}
    assert built.datamodule.max_tokens == matched.costs.context
    if not name.startswith("full/"):
        check_agreement(built.model.net.config, built.datamodule)
        sample = built.datamodule.source("test").sample(0, 0)
        assert len(built.datamodule._encoder()(sample)) <= built.datamodule.max_tokens


@pytest.mark.parametrize("name", [name for name in STUDIES if name.split("/")[-1] in ("ratio.yaml", "placement.yaml")])
def test_another_kind_of_attention(name: str) -> None:
    study = read_study(FILES[name], {"values.attention": "full"})
    for entry in match_cells(study, cells(study)):
        assert "swa" not in entry.cell.overrides["model.net.pattern"]
        assert abs(entry.residuals["params"]) <= 0.005
