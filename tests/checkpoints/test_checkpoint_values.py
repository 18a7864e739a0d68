"""Any value at any key of config.json gives a configuration that can be built, or one clear error."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import DATA, small_config

import hybridvl
from hybridvl.checkpoints import read_config
from hybridvl.checkpoints.formats import FORMATS
from hybridvl.checkpoints.loading import blank_model
from hybridvl.layers import ConfigError
from hybridvl.models.vlm import VisionLanguageModel

WRONG = (
    *([], [1], ["x"], [None], [[]], {}, {"x": 1}, {"rope_theta": {}}, "", "x", "12", True, False, None),
    *(0, -1, 3, 5000, 10**7, 10**25, 10**400, 0.0, 0.5, -2.5, 1e308, math.nan, math.inf),
)
Path_ = tuple[str | int, ...]


DELTA_NET = {
    **{"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 96, "rms_norm_eps": 1e-6},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 16},
    **{"linear_conv_kernel_dim": 4, "layer_types": ["linear_attention"] * 2, "full_attention_interval": 4},
    **{"hidden_act": "silu", "tie_word_embeddings": True, "quantization_config": None},
}
EXPERTS = {"num_experts": 0, "decoder_sparse_step": 1, "mlp_only_layers": [0]}


def examples() -> dict[str, dict[str, Any]]:
    """A small config.json of every format, with every key that is read."""
    own = FORMATS["hybridvl"].write_config
    assert own is not None
    flat = json.loads((DATA / "qwen2_5_vl_tiny" / "config_hub_flat.json").read_text())
    read = {name: json.loads((DATA / name / "config.json").read_text()) for name in ("qwen2_5_vl_tiny", "mamba2_tiny")}
    infinitevl = json.loads((DATA / "infinitevl_tiny_standard" / "config.json").read_text())
    return {
        "hybridvl": json.loads(json.dumps(own(small_config("full swa gdn mamba2 swa+gdn")))),
        "qwen2_5_vl": {**read["qwen2_5_vl_tiny"], "tie_word_embeddings": False},
        "qwen2_5_vl, flat": {**flat, "layer_types": None, "use_sliding_window": True, "tie_word_embeddings": False},
        "infinitevl": {"video_convention": "v457", **infinitevl, "tie_word_embeddings": False},
        "mamba2": {**read["mamba2_tiny"], "tie_word_embeddings": False},
        "qwen3_next": {**DELTA_NET, **EXPERTS, "model_type": "qwen3_next"},
        "olmo_hybrid": {
            **DELTA_NET,
            **{"model_type": "olmo_hybrid", "num_attention_heads": 2, "linear_allow_neg_eigval": True},
        },
    }


EXAMPLES = examples()
BUILT: set[str] = set()  # configurations whose models were built, so that each is built once


def places(values: Any, path: Path_ = ()) -> Iterator[Path_]:
    """The path of every value within values, the first two items of lists among them."""
    items = values.items() if isinstance(values, dict) else enumerate(values[:2]) if isinstance(values, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def changed(values: dict[str, Any], path: Path_, value: Any) -> dict[str, Any]:
    result = copy.deepcopy(values)
    node: Any = result
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return result


def outcome(folder: Path, values: dict[str, Any]) -> str:
    """What building the model of a config.json says; "" if it is built."""
    (folder / "config.json").write_text(json.dumps(values))
    try:
        config = read_config(folder)
        if repr(config) not in BUILT:
            blank_model(config, "place")
            BUILT.add(repr(config))
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", EXAMPLES)
def test_any_value_anywhere(tmp_path: Path, name: str) -> None:
    values = EXAMPLES[name]
    torch.save({}, tmp_path / "pytorch_model.bin")  # no weights: the head's place must not be asked for
    assert outcome(tmp_path, values) == ""
    refused = 0
    for path in places(values):
        for wrong in WRONG:
            message = outcome(tmp_path, changed(values, path, wrong))
            assert len(message) < 2000, (path, wrong)
            refused += message != ""
    assert refused > 100


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(EXAMPLES)))
def test_several_values_at_once(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, name: str) -> None:
    values = EXAMPLES[name]
    for _ in range(data.draw(st.integers(1, 3))):
        values = changed(values, data.draw(st.sampled_from(sorted(places(values), key=str))), data.draw(JSON))
    folder = tmp_path_factory.getbasetemp() / "drawn"
    folder.mkdir(exist_ok=True)
    torch.save({}, folder / "pytorch_model.bin")
    outcome(folder, values)


@pytest.mark.parametrize(
    ("name", "path", "value", "message"),
    [
        ("qwen2_5_vl", ("model_type",), ["x"], "config.json: model_type ['x']; expected one of hybridvl, qwen2_5_vl"),
        ("qwen2_5_vl", ("text_config",), [1], "config.json: text_config [1]; expected an object"),
        ("qwen2_5_vl", ("text_config", "rope_parameters", "rope_theta"), "x", "rope_theta 'x'; expected a finite"),
        ("qwen2_5_vl", ("vision_config", "tokens_per_second"), "x", "vision_config: tokens_per_second 'x'; expected a"),
        ("qwen2_5_vl", ("vision_config", "rope_parameters"), {"rope_theta": "x"}, "rope_parameters: rope_theta 'x'; "),
        ("qwen2_5_vl", ("text_config", "vocab_size"), 10**25, f"vocab_size {10**25}; expected a whole number from 1"),
        ("hybridvl", ("vocab_size",), 10**25, f"config.json: vocab_size: {10**25}; expected a whole number of at most"),
        ("hybridvl", ("mixers", "gdn", "heads"), 2**31, "gdn.heads = 2147483648: expected an integer of at most"),
        ("hybridvl", ("mixers", "gdn", "head_dim"), 2**30, "place: layer 2: GatedDeltaNet of more than 1e+12 par"),
        ("infinitevl", ("rope_scaling", "mrope_section"), [1, 1, 1], "config.json: mrope_section [1, 1, 1]; expected"),
    ],
)
def test_what_is_said(tmp_path: Path, name: str, path: Path_, value: Any, message: str) -> None:
    assert message in outcome(tmp_path, changed(EXAMPLES[name], path, value))


def test_rotary_sections_where_nothing_turns(tmp_path: Path) -> None:
    """A model of another head dim than attention's default, without any attention, is one of InfiniteVL's kinds."""
    mixers = {"gdn": {"heads": 4, "head_dim": 8}}
    config = dataclasses.replace(small_config("gdn*2"), mixers=mixers, rope_sections=(2, 3, 3))
    hybridvl.save(VisionLanguageModel(config), tmp_path, format="infinitevl")
    assert hybridvl.load(tmp_path).config.rope_sections == (2, 3, 3)
