"""Published configurations: the shapes, sizes and totals of Qwen2.5-VL and InfiniteVL, flat, nested and abridged."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import DATA
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import hybridvl
from hybridvl.checkpoints import read_config
from hybridvl.checkpoints.formats import find_format
from hybridvl.layers import ConfigError
from hybridvl.models.config import ModelConfig
from hybridvl.models.vlm import VisionLanguageModel

QWEN = DATA / "qwen2_5_vl_tiny"
PUBLISHED = DATA / "qwen2_5_vl_published"
TOTALS = {"3B": 3_754_622_976, "7B": 8_292_166_656, "32B": 33_452_718_336, "72B": 73_410_777_344}


def translated(values: dict[str, Any]) -> ModelConfig:
    return find_format(values, "place").config(values, True, "place")


def on_meta(config: ModelConfig) -> VisionLanguageModel:
    with torch.device("meta"):
        return VisionLanguageModel(config)


def parameters(module: torch.nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("size", TOTALS)
def test_published_sizes_of_qwen2_5_vl(tmp_path: Path, size: str) -> None:
    """Flat as published, and nested as transformers writes it now; its own model has the same tensors."""
    (tmp_path / "config.json").write_bytes((PUBLISHED / f"{size}.json").read_bytes())
    config = read_config(tmp_path)
    assert config.tie_embeddings == (size == "3B")
    model = on_meta(config)
    assert model.num_params == TOTALS[size]
    theirs = Qwen2_5_VLConfig.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "nested")
    assert read_config(tmp_path / "nested") == config
    with torch.device("meta"):
        reference = Qwen2_5_VLForConditionalGeneration(theirs)
    names = find_format(json.loads((tmp_path / "config.json").read_text()), "").ours
    shapes = {names(name): tensor.shape for name, tensor in reference.state_dict().items()}
    if config.tie_embeddings:
        del shapes["lm_head.weight"]
    assert shapes == {name: tensor.shape for name, tensor in model.state_dict().items()}


def infinitevl_4b() -> dict[str, Any]:
    """The published configuration: flat, and silent about what is the default."""
    values = json.loads((PUBLISHED / "3B.json").read_text())
    return {**values, "model_type": "infinite_vl", "sliding_window": 8192, "use_sliding_window": True}


def test_infinitevl_4b_part_by_part() -> None:
    model = on_meta(translated(infinitevl_4b()))
    assert model.pattern == "(swa gdn*3)*9"
    assert model.num_params == 4_408_381_536
    assert model.visual is not None
    assert parameters(model.visual) == 668_684_288
    assert parameters(model.visual.blocks) == 630_470_400
    assert parameters(model.visual.merger) == 36_708_608
    assert parameters(model.visual.patch_embed) == 1_505_280
    assert parameters(model.decoder.embed_tokens) == 311_164_928
    for number, layer in enumerate(model.decoder.layers):
        attention = number % 4 == 0
        assert parameters(layer) == (77_076_992 if attention else 101_290_272)
        assert parameters(layer.mixer) == (9_439_744 if attention else 33_653_024)
        assert parameters(layer.mlp) == 67_633_152


def test_infinitevl_4b_state() -> None:
    """Ours keeps recurrent states in float32, all W slots of a window instead of W - 1, and counts its tokens."""
    model = on_meta(translated(infinitevl_4b()))
    mixers = model.mixer_configs
    assert sum(mixer.state_bytes(10**6, torch.bfloat16, 2048) for mixer in mixers) == 133_890_120
    recurrent, slots, counters = 27 * 16 * 128 * 256, 9 * 2 * 2 * 128 * 2, 9 * 8
    assert 133_890_120 - counters - slots - 2 * recurrent == 105_569_280
    assert 4 * recurrent == 56_623_104
    state = model.to(torch.bfloat16).init_state(1)
    assert sum(layer.nbytes for layer in state.layers) == 133_890_120
    assert state.nbytes == 133_890_136  # with the row's length and next position
    assert "| 133,890,136 |" in (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()


def test_published_configs_without_the_optional_fields() -> None:
    """Fields that the published InfiniteVL config leaves out, and a model whose later layers slide."""
    values = json.loads((DATA / "infinitevl_tiny_standard" / "config.json").read_text())
    for name in ("head_dim", "linear_head_dim", "num_linear_heads", "num_linear_key_value_heads", "expand_v"):
        del values[name]
    values["rope_scaling"] = {"type": "mrope", "mrope_section": [16, 24, 24]}
    config = translated(values)
    assert config.mixers["swa"]["head_dim"] == 128
    wanted = {"heads": 16, "head_dim": 128, "expand_v": 2.0}
    assert {name: config.mixers["gdn"][name] for name in wanted} == wanted
    assert config.pattern.split() == ["swa", "gdn", "gdn", "gdn"] * 2
    values["layer_types"] = ["full_attention"] * 8
    assert set(translated(values).pattern.split()) == {"full"}
    values = json.loads((QWEN / "config_hub_flat.json").read_text())
    sliding = translated({**values, "use_sliding_window": True, "max_window_layers": 3})
    assert sliding.pattern.split() == ["full", "full", "full", "swa"]
    assert sliding.mixers["swa"]["window"] == 4096


def test_the_streaming_folder_is_the_same_model(tmp_path: Path) -> None:
    """Its weights and configuration are the standard ones, with its own code beside them."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((DATA / "infinitevl_tiny_standard" / name).read_bytes())
    values = json.loads((tmp_path / "config.json").read_text())
    values["auto_map"] = {name: code.replace("infinitevl.", "streaming.") for name, code in values["auto_map"].items()}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "modeling_infinitevl.py").write_text("raise SystemExit\n")
    model = hybridvl.load(tmp_path)
    assert model.config == hybridvl.load(DATA / "infinitevl_tiny_standard").config
    hybridvl.save(model, tmp_path / "out", format="infinitevl")
    for name in ("config.json", "modeling_infinitevl.py", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / name).read_bytes()
    hybridvl.save(model, tmp_path / "own")
    assert not (tmp_path / "own" / "modeling_infinitevl.py").exists()


@pytest.mark.parametrize("tied", [True, False, None])
@pytest.mark.parametrize("place", ["root", "text_config"])
def test_where_it_says_that_the_head_is_tied(tmp_path: Path, tied: bool | None, place: str) -> None:
    values = json.loads((QWEN / "config.json").read_text())
    del values["tie_word_embeddings"]
    if tied is not None:
        (values if place == "root" else values["text_config"])["tie_word_embeddings"] = tied
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "model.safetensors").write_bytes((QWEN / "model.safetensors").read_bytes())
    assert read_config(tmp_path).tie_embeddings == bool(tied)  # left open, the stored head decides


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "place: model_type 'llama'; expected one of hybridvl, qwen2_5_vl"),
        ({"hidden_act": "gelu"}, "place: hidden_act 'gelu'; expected 'silu'"),
        ({"layer_types": ["full_attention"]}, "place: 1 layer_types; expected num_hidden_layers = 4"),
        ({"layer_types": "full_attention"}, "place: layer_types 'full_attention'; expected num_hidden_layers = 4"),
        ({"layer_types": ["conv"] * 4}, r"place: layer_types \['conv'\]; expected full_attention"),
        ({"layer_types": ["linear_attention"] * 4}, r"place: layer_types \['linear_attention'\]; expected full_att"),
        ({"hidden_size": None}, "place: hidden_size None; expected a whole number"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "place: rope type 'yarn'"),
        ({"quantization_config": {"bits": 4}}, "place: quantization_config is given; expected a checkpoint with plain"),
    ],
)
def test_configs_that_are_not_understood(change: dict[str, Any], message: str) -> None:
    values = json.loads((QWEN / "config_hub_flat.json").read_text())
    with pytest.raises(ConfigError, match=message):
        translated({**values, **change})


@pytest.mark.parametrize("change", [{"num_attention_heads": 0}, {"vision_config": [1]}, {"rope_scaling": "mrope"}])
def test_values_of_the_wrong_kind(tmp_path: Path, change: dict[str, Any]) -> None:
    values = json.loads((QWEN / "config_hub_flat.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(ConfigError):
        read_config(tmp_path)


def test_a_configuration_written_and_read_is_itself() -> None:
    for name in ("qwen2_5_vl_tiny", "infinitevl_tiny_standard", "mamba2_tiny"):
        values = json.loads((DATA / name / "config.json").read_text())
        format = find_format(values, name)
        config = format.config(values, False, name)
        assert format.write_config is not None
        again = format.config(format.write_config(config), False, name)
        assert dataclasses.replace(again, mixers={}) == dataclasses.replace(config, mixers={})
