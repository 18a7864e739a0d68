"""Matched budgets, counted on models that are built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import hybridvl
from hybridvl.ablation.cells import cells, runs
from hybridvl.ablation.matching import Matched, match_cells
from hybridvl.ablation.recipes import recipe_model
from hybridvl.ablation.study import Study, read_study
from hybridvl.ablation.table import cell_rows, cell_table
from hybridvl.layers.errors import ConfigError
from hybridvl.models.config import ModelConfig
from hybridvl.models.vlm import VisionLanguageModel
from hybridvl.pipeline.mappings import read_mapping

NET: dict[str, Any] = {
    "pattern": "swa gdn*3",
    "width": 64,
    "mlp_width": 128,
    "vocab_size": 512,
    "image_token_id": 6,
    "video_token_id": 7,
    "mixers": {
        "full": {"heads": 2, "kv_heads": 2, "head_dim": 32},
        "swa": {"heads": 2, "kv_heads": 2, "head_dim": 32, "window": 32},
        "gdn": {"heads": 2, "head_dim": 32, "expand_v": 1.0},
        "mamba2": {"expand": 2, "head_dim": 32, "state_dim": 32},
    },
    "vision": {
        **{"depth": 1, "width": 32, "heads": 2, "mlp_width": 64, "patch_size": 8, "temporal_patch_size": 1},
        **{"spatial_merge_size": 1, "window_size": 8, "full_attention_blocks": [0], "channels": 1},
    },
}
PATTERNS = ["gdn*4", "(swa gdn)*2", "full*4", "mamba2*4", "swa+gdn gdn*3", "swa(window=8)*2 full*2"]


def _study(folder: Path, axes: dict[str, Any], match: Any, **more: Any) -> Study:
    recipe = {"model": {"net": NET}, "data": {"max_tokens": 96}}
    (folder / "base.yaml").write_text(json.dumps(recipe))
    path = folder / "study.yaml"
    path.write_text(json.dumps({"name": "n", "recipe": "base.yaml", "axes": axes, "match": match, **more}))
    return read_study(path)


def _patterns(*patterns: str) -> dict[str, Any]:
    return {"p": {"key": "model.net.pattern", "values": list(patterns)}}


def _built(study: Study, matched: Matched, device: str = "meta") -> VisionLanguageModel:
    recipes = [read_mapping(path) for path in study.recipes]
    with torch.device(device):
        return VisionLanguageModel(recipe_model(recipes, matched.cell.overrides))


def _flops_per_token(model: VisionLanguageModel, tokens: int) -> float:
    # The CPU's fused attention is not in the counter's table; the mathematical form has the same products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, tokens, dtype=torch.int64))
    return counter.get_total_flops() / tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


@pytest.mark.parametrize("budget", ["flops", "state_bytes"])
def test_cells_that_differ_in_their_data(folder: Path, budget: str) -> None:
    """Samples twice as long cost full attention more; that is no reason for another model."""
    by = "model.net.mlp_width" if budget == "flops" else "model.net.mixers.gdn.head_dim"
    axes = {"tokens": {"key": "data.max_tokens", "values": [128, 256]}, **_patterns("full gdn*3", "gdn*4")}
    more = {"baseline": {"tokens": 128, "p": "full gdn*3"}}
    own = {"budget": budget, "by": by, "tolerance": 0.2}
    found = match_cells(study := _study(folder, axes, own, **more), cells(study))
    first, _, long, both = found
    assert first.cell.labels == {"tokens": "128", "p": "full gdn*3"}
    assert (long.solved, long.residuals) == ({}, {budget: 0.0})
    assert long.costs is not None
    assert long.costs.context == 256
    assert long.costs.state_bytes == pytest.approx(2 * first.costs.state_bytes, rel=0.5)  # its own, which has grown
    # The cell that differs in its pattern, too, is matched at its own length.
    at_its_own = {"budget": budget, "by": by, "tolerance": 0.2, "context": 256}
    alone = _study(folder, _patterns("full gdn*3", "gdn*4"), at_its_own)
    assert both.solved == match_cells(alone, cells(alone))[1].solved != {}
    shown = [
        _study(
            folder, _patterns("full gdn*3", "gdn*4"), [{"budget": "params", "tolerance": 0.9}, {**own, "context": 640}]
        )
    ]
    (costs,) = {entry.costs.context for entry in match_cells(shown[0], cells(shown[0])) if entry.costs is not None}
    assert costs == 640


layers = st.sampled_from(["swa", "gdn", "full", "mamba2", "swa(window=8)", "swa+gdn", "gdn+mamba2"])


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(layers, min_size=4, max_size=4).map(" ".join), min_size=2, max_size=4, unique=True))
def test_parameters_of_built_models_are_equal(folder: Path, patterns: list[str]) -> None:
    axes = {"p": {"key": "model.net.pattern", "values": {str(n): text for n, text in enumerate(patterns)}}}
    study = _study(folder, axes, "params")
    found = match_cells(study, cells(study))
    counts = [_built(study, matched).num_params for matched in found]
    for matched, count in zip(found, counts, strict=True):
        assert matched.costs is not None
        assert matched.costs.params == count
        assert abs(count / counts[0] - 1) <= 0.005
        assert matched.residuals == {"params": pytest.approx(count / counts[0] - 1)}
        # One unit of width is 3 * width weights a layer: the nearest is at most half of that away.
        assert abs(count - counts[0]) <= 3 * 64 * 4 / 2
    assert found[0].solved == {}
    assert found[0].cell == cells(study)[0]


def test_flops_of_built_models_are_equal(folder: Path) -> None:
    study = _study(folder, _patterns("swa gdn*3", *PATTERNS), {"budget": "flops", "context": 64})
    found = match_cells(study, cells(study))
    wanted = _flops_per_token(_built(study, found[0], "cpu"), 64)
    for matched in found:
        assert matched.costs is not None
        flops = _flops_per_token(_built(study, matched, "cpu"), 64)
        assert matched.costs.flops == flops
        assert matched.residuals["flops"] == pytest.approx(flops / wanted - 1)
        assert abs(flops / wanted - 1) <= 0.005


def test_states_of_built_models_are_equal(folder: Path) -> None:
    match = {"budget": "state_bytes", "by": "model.net.mixers.swa.window", "tolerance": 0.05}
    study = _study(folder, _patterns("swa gdn*3", "swa*4", "swa*2", "(swa gdn)*2"), match)
    found = match_cells(study, cells(study))
    sizes = [_built(study, matched, "cpu").init_state(1).nbytes for matched in found]
    assert [matched.costs.state_bytes for matched in found if matched.costs] == sizes
    # A slot of a window is 512 bytes a layer: keys and values of 2 heads of 32 numbers of 4 bytes.
    for matched, size, layers in zip(found[1:], sizes[1:], (4, 2, 2), strict=True):
        assert abs(size - sizes[0]) <= 512 * layers / 2
        assert matched.solved == {"model.net.mixers.swa.window": matched.cell.overrides["model.net.mixers.swa.window"]}


def test_the_state_of_full_attention_is_that_at_the_context(folder: Path) -> None:
    match = {"budget": "state_bytes", "by": "model.net.mixers.swa.window"}
    study = _study(folder, _patterns("full*2", "swa*2"), match)
    full, window = match_cells(study, cells(study))
    assert full.costs is not None
    assert window.costs is not None
    # data.max_tokens is 96, which takes two blocks of 64 slots.
    assert (full.costs.context, window.solved) == (96, {"model.net.mixers.swa.window": 128})
    state = _built(study, full, "cpu").init_state(1)
    model = _built(study, full, "cpu")
    state = model.init_state(1)
    model(torch.zeros(1, 96, dtype=torch.int64), state=state)
    assert full.costs.state_bytes == window.costs.state_bytes == state.nbytes
    further = _study(folder, _patterns("full*2", "swa*2"), {**match, "context": 200})
    assert match_cells(further, cells(further))[1].solved == {"model.net.mixers.swa.window": 256}


def test_two_budgets_at_once(folder: Path) -> None:
    match = [
        {
            "budget": "state_bytes",
            "by": ["model.net.mixers.swa.window", "model.net.mixers.gdn.head_dim"],
            "tolerance": 0.05,
        },
        "params",
    ]
    study = _study(folder, _patterns("swa gdn*3", "swa*4", "gdn*4"), match)
    base, window, linear = match_cells(study, cells(study))
    assert window.solved.keys() == {"model.net.mixers.swa.window", "model.net.mlp_width"}
    assert linear.solved.keys() == {"model.net.mixers.gdn.head_dim", "model.net.mlp_width"}
    models = [_built(study, matched, "cpu") for matched in (base, window, linear)]
    params, states = [m.num_params for m in models], [m.init_state(1).nbytes for m in models]
    assert all(abs(count / params[0] - 1) <= 0.005 for count in params)
    assert all(abs(size / states[0] - 1) <= 0.05 for size in states)


def test_each_is_matched_with_the_baseline_of_its_own_other_labels(folder: Path) -> None:
    axes = {**_patterns("swa gdn*3", "gdn*4"), "width": {"key": "model.net.width", "values": [32, 64]}}
    study = _study(folder, axes, "params", baseline={"p": "swa gdn*3"})
    found = match_cells(study, cells(study))
    counts = [_built(study, matched).num_params for matched in found]
    assert abs(counts[2] / counts[0] - 1) <= 0.005
    assert abs(counts[3] / counts[1] - 1) <= 0.005
    assert counts[1] > 1.5 * counts[0]
    assert [bool(matched.solved) for matched in found] == [False, False, True, True]
    arguments = [run.arguments for run in runs(study, [matched.cell for matched in found])]
    widths = [[word for word in words if "mlp_width" in word] for words in arguments]
    assert [len(words) for words in widths] == [0, 0, 1, 1]


def test_multiples(folder: Path) -> None:
    study = _study(
        folder, _patterns("swa gdn*3", "mamba2*4"), {"budget": "params", "multiple_of": 16, "tolerance": 0.05}
    )
    assert match_cells(study, cells(study))[1].solved["model.net.mlp_width"] % 16 == 0


MISTAKES = [
    (
        _patterns("gdn*2", "gdn*9"),
        {"budget": "params"},
        r"cell p=gdn_9~\w+: match: [\d,]+ parameters against [\d,]+ of p=gdn_2~\w+; "
        r"the nearest is [\d,]+ \(\+[\d.]+ %\) with model\.net\.mlp_width 1; "
        r"expected a match\.by that comes within 0\.5 %, or a larger match\.tolerance",
    ),
    (
        _patterns("swa gdn", "gdn*2"),
        {"budget": "state_bytes", "by": "model.net.mixers.swa.window"},
        r"bytes of state against [\d,]+ of .*; model\.net\.mixers\.swa\.window does not change it;",
    ),
    (
        _patterns("swa gdn", "gdn*2"),
        {"budget": "params", "by": ["model.optimizer.lr", "model.net.mixers.swa.window"]},
        r"model\.optimizer\.lr does not change it; model\.net\.mixers\.swa\.window does not change it",
    ),
    (
        {"w": {"key": "model.net.mlp_width", "values": [8, 16]}},
        "params",
        r"match\.by: model\.net\.mlp_width is what axis 'w' varies; expected another number, or a baseline without 'w'",
    ),
    (
        _patterns("swa", "swa*2"),
        {"budget": "params", "by": "model.net.mlpwidth"},
        r"match\.by: 'model\.net\.mlpwidth' is no key of the recipe, did you mean 'model\.net\.mlp_width'\?",
    ),
    (
        {"p": {"key": "model.net.patern", "values": ["swa", "gdn"]}},
        "none",
        r"axes\.p\.key: 'model\.net\.patern' is no key of the recipe, did you mean 'model\.net\.pattern'\?",
    ),
    (
        {"d": {"values": {"a": {}, "b": {"model.net.vision.deph": 2}}}},
        "none",
        r"axes\.d\.values\.b: 'model\.net\.vision\.deph' is no key .* 'model\.net\.vision\.depth'\?",
    ),
    (
        {"w": {"key": "model.net.mixers.swa.windw", "values": [1, 2]}},
        "none",
        r"cell w=1: model\.net\.mixers\.swa\.windw: unknown option, did you mean 'window'\?",
    ),
    (
        _patterns("swa", "mamba2"),
        {"budget": "params", "by": "model.net.width"},
        r"match\.by: with model\.net\.width 2: .*; match\.multiple_of skips values",
    ),
    (
        _patterns("swa gdn*3", "gdn*4"),
        [
            "params",
            {"budget": "state_bytes", "by": "model.net.mixers.gdn.head_dim", "tolerance": 0.1},
        ],
        r"match: params was matched, and changed by [-+][\d.]+ % when another budget was",
    ),
]


@pytest.mark.parametrize(("axes", "match", "message"), MISTAKES)
def test_what_cannot_be_matched(axes: dict[str, Any], match: Any, message: str, tmp_path: Path) -> None:
    study = _study(tmp_path, axes, match)
    with pytest.raises(ConfigError, match=rf"^{study.path}: .*{message}"):
        match_cells(study, cells(study))


def test_a_larger_tolerance_takes_the_nearest(folder: Path) -> None:
    study = _study(folder, _patterns("gdn*3", "gdn*4"), {"budget": "params", "tolerance": 0.9, "multiple_of": 64})
    _, found = match_cells(study, cells(study))
    counts = {}
    for width in (64, 128):
        wide = _study(folder, _patterns("gdn*4"), "none", overrides={"model.net.mlp_width": width})
        counts[width] = _built(wide, match_cells(wide, cells(wide))[0]).num_params
    target = _built(study, match_cells(study, cells(study))[0]).num_params
    nearest = min(counts, key=lambda width: abs(counts[width] - target))
    assert found.solved == {"model.net.mlp_width": nearest}
    assert abs(found.residuals["params"]) > 0.005


def test_the_baseline_of_a_cell_is_excluded(folder: Path) -> None:
    axes = {**_patterns("swa", "gdn"), "width": {"key": "model.net.width", "values": [32, 64]}}
    study = _study(folder, axes, "params", baseline={"p": "swa"}, exclude=[{"p": "swa", "width": "64"}])
    with pytest.raises(ConfigError, match=r"match: cell p=gdn,width=64 has nothing to be matched with"):
        match_cells(study, cells(study))


def test_a_mistake_in_a_pattern_names_its_cell(folder: Path) -> None:
    study = _study(folder, _patterns("swa", "gdnn"), "none")
    with pytest.raises(ConfigError, match=rf"^{study.path}: cell p=gdnn: .*gdnn"):
        match_cells(study, cells(study))


def test_the_table(folder: Path) -> None:
    study = _study(folder, _patterns("swa gdn*3", "gdn*4"), "params", seeds=[0, 1, 2])
    found = match_cells(study, cells(study))
    rows = cell_rows(found)
    assert [row["labels"] for row in rows] == [{"p": "swa gdn*3"}, {"p": "gdn*4"}]
    assert [row["params"] for row in rows] == [_built(study, matched).num_params for matched in found]
    assert json.loads(json.dumps(rows)) == rows
    console = Console(width=150, record=True)
    console.print(cell_table(study, found, {"time": ["1 s", "2 s"]}))
    shown = console.export_text()
    assert "n: 2 cells x 3 seeds = 6 runs" in shown
    (base,) = (line for line in shown.splitlines() if "swa gdn*3" in line)
    (other,) = (line for line in shown.splitlines() if "gdn*4" in line and "swa" not in line)
    assert "baseline" in base
    assert f"{rows[0]['params']:,}" in base
    assert f"{100 * rows[1]['residuals']['params']:+.2f} %" in other
    assert str(rows[1]["solved"]["model.net.mlp_width"]) in other
    assert "2 s" in other


STUDENT = "run: {stage: layers}\nmodel: {student: {teacher: TEACHER, pattern: gdn}}\n"
INHERIT = "{name: n, recipe: base.yaml, axes: {i: {key: model.student.inherit, values: [none, qkvo]}}}"


def _students(folder: Path, teacher: str) -> Path:
    (folder / "base.yaml").write_text(STUDENT.replace("TEACHER", teacher))
    (folder / "study.yaml").write_text(INHERIT)
    return folder / "study.yaml"


def test_a_student_of_a_teacher_on_the_hub(tmp_path: Path) -> None:
    path = _students(tmp_path, "someone/teacher")
    study = read_study(path)
    found = match_cells(study, cells(study))
    assert [matched.costs for matched in found] == [None, None]
    assert [row["params"] for row in cell_rows(found)] == [None, None]
    console = Console(width=150, record=True)
    console.print(cell_table(study, found))
    assert "model.student.teacher: someone/teacher is on a hub" in " ".join(console.export_text().split())
    matched = read_study(path, {"match": "{budget: params, by: model.student.mixers.gdn.heads}"})
    with pytest.raises(ConfigError, match=rf"^{path}: cell .*: model\.student\.teacher: someone/teacher is on a hub"):
        match_cells(matched, cells(matched))


def test_a_student_of_a_teacher_that_is_not_there(tmp_path: Path) -> None:
    path = _students(tmp_path, f"{tmp_path}/gone/model")
    study = read_study(path)
    with pytest.raises(
        ConfigError, match=rf"^{path}: cell i=none: model\.student\.teacher: .*/gone/model: no such folder"
    ):
        match_cells(study, cells(study))


def test_a_student_and_a_model_that_goes_on(tmp_path: Path) -> None:
    teacher = VisionLanguageModel(ModelConfig.from_dict({**NET, "pattern": "full*2"}))
    hybridvl.save(teacher, tmp_path / "teacher")
    study = read_study(_students(tmp_path, f"{tmp_path}/teacher"), {"overrides.model.student.pattern": "gdn swa"})
    recipes = [read_mapping(recipe) for recipe in study.recipes]
    student = recipe_model(recipes, {"model.student.mixers.swa.window": 8, "model.student.pattern": "gdn swa"})
    assert (student.pattern, student.width, student.mixers["swa"]["window"]) == ("gdn swa", 64, 8)
    costs = {entry.costs.params for entry in match_cells(study, cells(study)) if entry.costs}
    with torch.device("meta"):
        assert costs == {VisionLanguageModel(student).num_params}
    source = {"model": {"source": f"{tmp_path}/teacher"}}
    assert recipe_model([source], {"model.net.activation_checkpointing": True}).activation_checkpointing
    assert recipe_model([source], {}) == teacher.config
    assert recipe_model([source, {"model": {"net": {"pattern": "gdn"}}}], {}).pattern == "gdn"
