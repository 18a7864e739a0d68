"""Conversion: what stays equal, what is counted, how new mixers are sized, and that the result can be worked with."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from model_cases import DATA, MIXERS, prompts, relative_error, small_config, small_model

import hybridvl
from hybridvl.checkpoints import open_checkpoint
from hybridvl.conversion import Conversion, Report, convert, prepare
from hybridvl.conversion.target import default_options, target_config
from hybridvl.layers import ConfigError, Sequence
from hybridvl.layers.gdn import GatedDeltaNetConfig
from hybridvl.layers.swa import SlidingWindowConfig
from hybridvl.models.config import ModelConfig, VisionConfig
from hybridvl.models.vlm import VisionLanguageModel

QWEN = DATA / "qwen2_5_vl_tiny"
INFINITEVL = DATA / "infinitevl_tiny_standard"
MAMBA = DATA / "mamba2_tiny"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four layers of full attention, 4 query and 2 key/value heads of 16."""
    torch.manual_seed(0)
    config = dataclasses.replace(small_config("full*4"), mixers={"full": MIXERS["full"]})
    hybridvl.save(VisionLanguageModel(config), tmp_path / "source")
    return tmp_path / "source"


def logits(model: VisionLanguageModel) -> list[torch.Tensor]:
    with torch.no_grad():
        return [
            model(row.input_ids, pixel_values=row.pixel_values, image_grid_thw=row.image_grid_thw).logits
            for row in prompts()
        ]


def test_the_same_pattern_is_the_same_model(folder: Path) -> None:
    model, report = convert(folder, "full*4")
    assert all(map(torch.equal, logits(model), logits(small_model("full*4"))))
    assert {layer.how for layer in report.layers} == {"copied"}
    assert report.total.params == report.total.copied == model.num_params
    assert report.total.left == 0


def test_layers_of_several_mixers_stay_what_they_are(tmp_path: Path) -> None:
    source = small_model("(swa+mamba2) (full+gdn(heads=4)) swa(window=3)")
    hybridvl.save(source, tmp_path)
    model, report = convert(tmp_path, "swa+mamba2 full+gdn(heads=4) swa(window=3)")
    assert all(map(torch.equal, logits(model), logits(source)))
    assert report.total.new == report.total.left == 0
    _, report = convert(tmp_path, "swa+mamba2(dt_max=1.0) full+gdn(heads=4, negative_eigenvalues=true) swa(rope=false)")
    assert [layer.how for layer in report.layers] == ["options"] * 3
    _, report = convert(tmp_path, "swa(window=5)+mamba2 full full")
    assert [layer.how for layer in report.layers] == ["window", "new", "window"]


@pytest.mark.parametrize("inherit", ["none", "qkvo"])
def test_a_window_of_the_whole_row_changes_nothing(folder: Path, inherit: str) -> None:
    longest = max(row.input_ids.shape[1] for row in prompts())
    model, report = convert(folder, f"swa(window={longest})*2 full swa(window={longest})", inherit)
    for found, wanted in zip(logits(model), logits(small_model("full*4")), strict=True):
        assert relative_error(found, wanted) < 1e-6
    assert [layer.how for layer in report.layers] == ["window", "window", "copied", "window"]
    assert report.total.new == report.total.left == 0
    narrow, _ = convert(folder, "swa(window=2)*4")
    assert relative_error(logits(narrow)[0], logits(model)[0]) > 1e-3


@pytest.mark.parametrize("source", [QWEN, INFINITEVL, MAMBA], ids=lambda path: path.name)
def test_other_projects_models_stay_what_they_are(source: Path) -> None:
    before = hybridvl.load(source)
    model, report = convert(source, before.pattern)
    assert before.pattern == model.pattern == report.pattern_before == report.pattern
    assert model.mixer_configs == before.mixer_configs
    ids = torch.arange(7).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before(ids).logits)


CONVERSIONS = [
    (QWEN, "gdn*{n}", {}),
    (QWEN, "(swa gdn)@{n}", {}),
    (QWEN, "swa+mamba2 @{n}", {}),
    (QWEN, "gdn(expand_v=0.5) mamba2(proj_bias=true) @{n}", {}),
    (QWEN, "full(qkv_bias=false) gdn(value_heads=8) @{n}", {}),
    (INFINITEVL, "full*{n}", {}),
    (INFINITEVL, "(gdn swa)@{n}", {}),
    (
        MAMBA,
        "(full gdn) @{n}",
        {"full": {"heads": 2, "kv_heads": 1, "head_dim": 16}, "gdn": {"heads": 2, "head_dim": 8}},
    ),
]


@pytest.mark.parametrize(("source", "pattern", "mixers"), CONVERSIONS)
@pytest.mark.parametrize("inherit", ["none", "qkvo"])
def test_every_weight_is_counted(source: Path, pattern: str, mixers: dict, inherit: str) -> None:
    checkpoint = open_checkpoint(source)
    depth = len(hybridvl.load(source).mixer_configs)
    conversion = prepare(checkpoint, pattern.format(n=depth), inherit, mixers)
    models = [conversion.model(seed) for seed in (0, 1)]
    total = conversion.report.total
    assert total.params == models[0].num_params
    assert total.copied + total.left == sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names)
    # What the seed changes is new; new weights that it does not change are drawn as zeros or ones.
    tensors = [model.state_dict() for model in models]
    changed = sum(int((tensors[0][name] != tensors[1][name]).sum()) for name in tensors[0])
    constant = sum(
        int(torch.isin(tensor, torch.tensor([0.0, 1.0])).sum())
        for name, tensor in tensors[0].items()
        if ".mixer." in name
    )
    assert changed <= total.new <= changed + constant
    assert_layers_agree(conversion, models[0])


def assert_layers_agree(conversion: Conversion, model: VisionLanguageModel) -> None:
    """Runs and counts of every tensor of the report against the tensors themselves."""
    tensors = model.state_dict()
    for layer in conversion.report.layers:
        for tensor in layer.tensors:
            found = tensors[f"decoder.layers.{layer.layer}.mixer.{tensor.name}"]
            assert tensor.counts.params == found.numel()
            placed = 0
            for part in tensor.inherited:
                source = conversion.checkpoint.tensor(f"decoder.layers.{layer.source_layer}.mixer.{part.source}")
                axis = ("rows", "columns").index(part.axis)
                for into, taken, length in part.runs:
                    here, there = found.narrow(axis, into, length), source.narrow(axis, taken, length)
                    placed += here.numel()
                    ratio = here / there
                    torch.testing.assert_close(ratio, ratio.flatten()[0].expand_as(ratio), rtol=1e-5, atol=0)
            assert placed == tensor.counts.copied + tensor.counts.repeated
        assert sum(layer.left.values()) == layer.counts.left


def test_the_report_of_one_layer(folder: Path) -> None:
    _, report = convert(folder, "full*3 gdn")
    layer = report.layers[3]
    counts = {tensor.name: dataclasses.astuple(tensor.counts) for tensor in layer.tensors}
    assert counts["q_proj.weight"] == (64 * 32, 0, 0, 0)
    assert counts["k_proj.weight"] == (32 * 32, 32 * 32, 0, 0)  # two heads, each twice
    assert counts["v_proj.weight"] == (32 * 32, 32 * 32, 64 * 32, 0)  # half of every value head is new
    assert counts["o_proj.weight"] == (64 * 32, 0, 64 * 32, 0)
    assert counts["A_log"] == (0, 0, 4, 0)
    assert layer.left == {"q_proj.bias": 64, "k_proj.bias": 32, "v_proj.bias": 32}
    (part,) = next(tensor for tensor in layer.tensors if tensor.name == "v_proj.weight").inherited
    assert part.runs == ((0, 0, 16), (32, 0, 16), (64, 16, 16), (96, 16, 16))
    assert (layer.before, layer.after, layer.how) == ("full", "gdn", "inherited")
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["total"] == {**dataclasses.asdict(report.total), "params": report.total.params}
    assert plain["layers"][3]["left"] == layer.left
    assert sum(part["params"] for part in plain["parts"].values()) == report.total.params


def test_only_what_is_inherited_differs_between_inheritances(folder: Path) -> None:
    fresh, inheriting = (convert(folder, "(gdn mamba2)@4", way, seed=3)[0] for way in ("none", "qkvo"))
    other = inheriting.state_dict()
    differing = {
        name.split(".mixer.")[1] for name, tensor in fresh.state_dict().items() if not torch.equal(tensor, other[name])
    }
    projections = {f"{name}_proj.weight" for name in ("q", "k", "v", "o", "in", "out")}
    assert differing == projections
    again, _ = convert(folder, "(gdn mamba2)@4", seed=3)
    assert all(torch.equal(tensor, other[name]) for name, tensor in again.state_dict().items())
    reseeded, _ = convert(folder, "(gdn mamba2)@4", seed=4)
    assert not torch.equal(reseeded.state_dict()["decoder.layers.0.mixer.A_log"], other["decoder.layers.0.mixer.A_log"])


@torch.no_grad()
def test_convolutions_that_pass(folder: Path) -> None:
    plain, passing = (convert(folder, "(gdn mamba2)@4", pass_convs=way)[0] for way in (False, True))
    own, other = plain.state_dict(), passing.state_dict()
    differing = {name for name, tensor in own.items() if not torch.equal(tensor, other[name])}
    assert differing == {name for name in own if "conv1d" in name}
    x = torch.randn(1, 9, 64)
    conv = passing.decoder.layers[0].mixer.q_conv1d
    torch.testing.assert_close(conv(x, Sequence(), None), torch.nn.functional.silu(x))
    with_bias = passing.decoder.layers[1].mixer.conv1d
    x = torch.randn(1, 9, len(with_bias.weight))
    torch.testing.assert_close(with_bias(x, Sequence(), None), torch.nn.functional.silu(x))


def test_the_global_generator_is_left_alone(folder: Path) -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    convert(folder, "gdn*4")
    assert torch.equal(torch.rand(3), wanted)


def test_layers_of_another_depth(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"pattern 'swa\*3' has 3 layers; expected 4, one for each layer of the sour"):
        convert(folder, "swa*3")
    model, report = convert(folder, "full swa(window=99) full*3", layers=[0, 3, 3, 0, 0])
    source = small_model("full*4").state_dict()
    own = model.state_dict()
    for layer, origin in enumerate([0, 3, 3, 0, 0]):
        for name in ("mixer.q_proj.bias", "mlp.up_proj.weight", "mixer_norm.weight"):
            assert torch.equal(own[f"decoder.layers.{layer}.{name}"], source[f"decoder.layers.{origin}.{name}"])
    per_layer = sum(tensor.numel() for name, tensor in source.items() if name.startswith("decoder.layers.0."))
    assert (report.total.repeated, report.total.left, report.total.new) == (3 * per_layer, 2 * per_layer, 0)
    assert report.total.params == model.num_params
    with torch.no_grad():
        own["decoder.layers.1.mixer.q_proj.weight"].zero_()
    assert own["decoder.layers.2.mixer.q_proj.weight"].any()  # layers with one origin are trained apart
    with pytest.raises(ConfigError, match=r"layers: 4; expected layers of the source, 0 to 3"):
        convert(folder, "full*2", layers=[0, 4])
    with pytest.raises(ConfigError, match=r"layers: a list of 1; expected 2, one for each layer of 'full\*2'"):
        convert(folder, "full*2", layers=[0])


def test_dtypes(tmp_path: Path) -> None:
    hybridvl.save(small_model("full*2", torch.bfloat16), tmp_path / "half")
    wide = {"A_log", "dt_bias"}
    for dtype, wanted in ((None, torch.bfloat16), (torch.float32, torch.float32), (torch.float16, torch.float16)):
        model, _ = convert(tmp_path / "half", "full gdn(heads=4)", dtype=dtype)
        found = {(name.split(".")[-1] in wide, tensor.dtype) for name, tensor in model.state_dict().items()}
        assert found == {(False, wanted), (True, torch.float32)}
    source = hybridvl.load(tmp_path / "half").decoder.layers[1].mixer.q_proj.weight
    model, _ = convert(tmp_path / "half", "full gdn(heads=4, head_dim=16)")
    assert torch.equal(model.decoder.layers[1].mixer.q_proj.weight, source)


def test_infinitevl_is_the_default_size() -> None:
    """The published sizes come out of Qwen2.5-VL-3B's without a single option."""
    source = ModelConfig(pattern="full*36", vision=VisionConfig())
    config = target_config(source, "(swa gdn*3)*9")
    with torch.device("meta"):
        model = VisionLanguageModel(config)
    assert model.num_params == 4_408_381_536
    assert model.mixer_configs[:2] == [SlidingWindowConfig(), GatedDeltaNetConfig()]


def test_options_by_precedence() -> None:
    source = small_config("swa(window=4, heads=8) gdn")
    with_default = target_config(source, "swa gdn")
    assert with_default.mixers == {"swa": {**MIXERS["swa"], "window": 4, "heads": 8}, "gdn": MIXERS["gdn"]}
    pattern = "swa(window=6) wide(heads=2) full"
    config = target_config(source, pattern, {"wide": {"type": "swa", "window": 7}, "swa": {"window": 5, "kv_heads": 4}})
    with torch.device("meta"):
        swa, wide, full = VisionLanguageModel(config).mixer_configs
    assert (swa.window, swa.kv_heads, swa.heads, swa.head_dim) == (6, 4, 8, 16)
    assert (wide.window, wide.kv_heads, wide.heads, wide.head_dim) == (7, 2, 2, 16)
    assert (full.heads, full.kv_heads, full.head_dim) == (4, 2, 16)  # from the source's own table of mixers
    plain = dataclasses.replace(source, pattern="full(heads=8, kv_heads=4, head_dim=4)", mixers={})
    sizes = default_options(plain)
    assert sizes["gdn"] == {"heads": 8, "head_dim": 4}
    assert sizes["mamba2"] == {"expand": 1, "head_dim": 4, "state_dim": 4, "groups": 8}
    assert sizes["swa"]["kv_heads"] == 4
    assert target_config(plain, "full").mixers == {"full": {"heads": 8, "kv_heads": 4, "head_dim": 4}}
    named = ModelConfig(pattern="near*2 far", mixers={"near": {"type": "swa", "window": 3}, "far": {"type": "full"}})
    assert target_config(named, "near far*2").mixers == named.mixers


@pytest.mark.parametrize(
    ("pattern", "mixers", "message"),
    [
        ("(swa gdm)*2", {}, r"layer pattern, column 6: unknown mixer 'gdm', did you mean 'gdn'\?"),
        ("swa(windw=3)*4", {}, r"column 5: swa.windw: unknown option, did you mean 'window'"),
        ("swa*4", {"swa": {"window": 0}}, r"mixers.swa.window = 0: expected an integer of at least 1"),
        (
            "swa*4",
            {"sva": {"window": 2}},
            r"mixers.sva: no type, and no mixer is registered as 'sva', did you mean 'swa'",
        ),
        ("swa*4", {"swa": 3}, r"mixers.swa: 3; expected a mapping of options"),
        ("swa*4", ["swa"], r"mixers: \['swa'\]; expected a mapping of names to options"),
        ("gdn(heads=3)*4", {}, r"layer 0: gdn.heads: 3 heads cannot inherit from 4 query heads"),
    ],
)
def test_mistakes(folder: Path, pattern: str, mixers: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert(folder, pattern, mixers=mixers)


def test_broken_sources(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        convert(tmp_path / "none", "full")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "pattern": "full*5"}))
    with pytest.raises(
        ConfigError, match=r"source: weights do not fit the configuration beside them: .*decoder.layers.4"
    ):
        convert(folder, "full*5")


def test_a_converted_model_learns_and_speaks(folder: Path, tmp_path: Path) -> None:
    model, _ = convert(folder, "(swa gdn)*2")
    hybridvl.save(model, tmp_path / "student")
    student = hybridvl.load(tmp_path / "student").train()
    assert all(torch.equal(tensor, student.state_dict()[name]) for name, tensor in model.state_dict().items())
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    ids = torch.arange(1, 13).unsqueeze(0)
    losses = []
    for _ in range(4):
        loss = torch.nn.functional.cross_entropy(student(ids).logits[0, :-1], ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for name, p in student.named_parameters() if "visual" not in name)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert student.eval().generate(ids, max_new_tokens=3).shape == (1, 15)
    trained, _ = convert(folder, "(swa gdn)*2")  # training a model mapped from the source leaves the source alone
    trained.decoder.embed_tokens.weight.data.zero_()
    assert hybridvl.load(folder).decoder.embed_tokens.weight.any()


def test_reports_compare_by_value(folder: Path) -> None:
    reports: list[Report] = [convert(folder, "(swa gdn)*2")[1] for _ in range(2)]
    assert reports[0] == reports[1]
