"""Conversions from and to other projects' layer descriptions, and refusals of what either side cannot say."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridvl.layers import ConfigError
from hybridvl.layers.gdn import GatedDeltaNetConfig
from hybridvl.layers.swa import SlidingWindowConfig
from hybridvl.pattern import parse_pattern
from hybridvl.pattern.formats import (
    from_fla_attn,
    from_layer_types,
    from_megatron,
    to_fla_attn,
    to_layer_types,
    to_megatron,
)


def test_layer_types_of_known_models() -> None:
    qwen3_next = (["linear_attention"] * 3 + ["full_attention"]) * 12
    assert str(from_layer_types(qwen3_next)) == "(gdn*3 full)*12"
    assert to_layer_types(parse_pattern("(gdn*3 full)*12")) == qwen3_next
    infinitevl = (["sliding_attention"] + ["linear_attention"] * 3) * 9
    assert str(from_layer_types(infinitevl)) == "(swa gdn*3)*9"
    assert to_layer_types(parse_pattern("(swa gdn*3)*9")) == infinitevl
    assert str(from_layer_types(["mamba", "attention", "mamba2"])) == "mamba2 full mamba2"
    assert str(from_layer_types(["linear_attention", "full_attention"], linear="mamba2")) == "mamba2 full"
    assert to_layer_types(parse_pattern("mamba2 full")) == ["mamba", "full_attention"]


def test_layer_types_take_named_mixers() -> None:
    mixers = {"wide": {"type": "swa", "window": 64}, "gdn": {"heads": 4}}
    assert to_layer_types(parse_pattern("wide gdn", mixers), mixers) == ["sliding_attention", "linear_attention"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("gdn swa+mamba2", r"layer 1 \(swa\+mamba2\): layer_types cannot say parallel mixers"),
        ("gdn swa(window=4)", r"layer 1 \(swa\(window=4\)\): layer_types cannot say options"),
        ("wide gdn swa", r"layer 2 \(swa\): layer_types cannot tell it from 'wide', both are 'swa'"),
    ],
)
def test_what_layer_types_cannot_say(pattern: str, message: str) -> None:
    mixers = {"wide": {"type": "swa", "window": 64}}
    with pytest.raises(ConfigError, match=message):
        to_layer_types(parse_pattern(pattern, mixers), mixers)


def test_layer_types_that_no_mixer_stands_for() -> None:
    with pytest.raises(ConfigError, match=r"layer_types\[1\]: no mixer stands for 'chunked_attention'.*full_attention"):
        from_layer_types(["full_attention", "chunked_attention"])
    with pytest.raises(ConfigError, match="did you mean 'full_attention'"):
        from_layer_types(["fullattention"])


def test_megatron_strings() -> None:
    assert str(from_megatron("*-G-G-G-" * 9)) == "(full gdn*3)*9"
    assert to_megatron(parse_pattern("(full gdn*3)*2")) == "*-G-G-G-*-G-G-G-"
    assert str(from_megatron("MMM*MMM", mlp=False)) == "mamba2*3 full mamba2*3"
    assert to_megatron(parse_pattern("mamba2*3 full mamba2*3"), mlp=False) == "MMM*MMM"


@pytest.mark.parametrize(
    ("text", "mlp", "column", "message"),
    [
        ("M-M-M*-", True, 6, "a mixer without an MLP"),
        ("MM", True, 2, r"a mixer without an MLP.*mlp=False"),
        ("M-M", True, 4, r"the end after a mixer without an MLP"),
        ("M--", True, 3, "an MLP"),
        ("-M", True, 1, "an MLP"),
        ("M-", False, 2, "layers have none"),
        ("ME", False, 2, "'E', a mixture of experts, which a pattern does not hold"),
        ("M|M", False, 2, "a cut between pipeline stages"),
        ("M/M", False, 2, "multi-token prediction"),
        ("[M*]", False, 1, "a group of layers"),
        ("M+", False, 2, "multi-latent attention"),
        ("Mx", False, 2, r"'x'; expected one of '\*', 'G', 'M', '-'"),
    ],
)
def test_what_a_pattern_cannot_say_of_megatron(text: str, mlp: bool, column: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        from_megatron(text, mlp=mlp)
    assert caught.value.column == column  # type: ignore[attr-defined]


def test_what_megatron_cannot_say() -> None:
    with pytest.raises(
        ConfigError, match=r"layer 0 \(swa\): Megatron's hybrid pattern has one window for all attention"
    ):
        to_megatron(parse_pattern("swa gdn"))
    with pytest.raises(ConfigError, match="parallel"):
        to_megatron(parse_pattern("full+gdn"))


ATTN = {"layers": [0, 4], "num_heads": 16, "num_kv_heads": 4, "qkv_bias": True, "window_size": 2048, "rope_theta": 1e4}


def test_fla_attn_to_a_pattern() -> None:
    pattern = from_fla_attn(ATTN, num_layers=8, width=1024)
    assert str(pattern) == "(swa(head_dim=64, heads=16, kv_heads=4, qkv_bias=true, window=2048) gdn*3)*2"
    attention = SlidingWindowConfig(window=2048, heads=16, kv_heads=4, head_dim=64)
    assert pattern.configs() == [attention, *[GatedDeltaNetConfig()] * 3] * 2
    assert to_fla_attn(pattern, width=1024) == ATTN


def test_fla_defaults() -> None:
    pattern = from_fla_attn({"layers": [1], "num_heads": 8}, num_layers=2, width=1024, base="mamba2")
    assert str(pattern) == "mamba2 full(head_dim=128, heads=8, kv_heads=8, qkv_bias=false)"
    assert str(from_fla_attn(None, num_layers=24, width=1024)) == "gdn*24"
    assert to_fla_attn(parse_pattern("gdn*24"), width=1024) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [8]}, "attn.layers: 8; expected indices from 0 to 7"),
        ({"layers": [-1]}, "attn.layers: -1"),
        ({"layers": None}, "attn.layers: None; expected a list"),
        ({"num_heads": 7}, "attn.num_heads: 7; expected a divisor of the width 1024"),
        ({"num_heads": None}, "attn.num_heads: None"),
        ({"num_kv_heads": 3}, "attn.num_kv_heads: 3; expected a divisor of num_heads = 16"),
        ({"qkv_bias": 1}, "attn.qkv_bias: 1; expected true or false"),
        ({"window_size": 0}, "attn.window_size: 0; expected null or"),
        ({"rope_theta": 5e5}, "attn.rope_theta: 500000.0; expected the model's rope_theta = 10000.0"),
        ({"block_size": 64}, "attn.block_size: a pattern cannot say it; expected keys layers, num_heads"),
    ],
)
def test_what_a_pattern_cannot_say_of_fla(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_fla_attn({**ATTN, **changes}, num_layers=8, width=1024)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("swa+mamba2 gdn", r"layer 0 \(swa\+mamba2\): fla's attn has no parallel layers"),
        ("swa gdn full", r"layer 2 \(full\): a second kind of attention"),
        ("swa gdn mamba2", r"layer 2 \(mamba2\): a second kind of linear mixer"),
        ("swa gdn gdn(heads=4)", r"layer 2 .*a second kind of linear mixer"),
        ("swa(qk_norm=true)", "swa.qk_norm = True: fla's attn cannot say it"),
        ("full(heads=8)", "full.head_dim = 128: fla's attn cannot say it; it is 256"),
        ("full(rope=false)", "full.rope = False"),
    ],
)
def test_what_fla_cannot_say(pattern: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        to_fla_attn(parse_pattern(pattern), width=2048)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["full", "gdn", "mamba2"]), min_size=1, max_size=60), st.booleans())
def test_every_format_round_trips(names: list[str], mlp: bool) -> None:
    pattern = parse_pattern(" ".join(names))
    assert from_layer_types(to_layer_types(pattern)) == pattern
    assert from_megatron(to_megatron(pattern, mlp=mlp), mlp=mlp) == pattern
    if not {"gdn", "mamba2"} <= set(names):
        base = "mamba2" if "mamba2" in names else "gdn"
        again = from_fla_attn(to_fla_attn(pattern, width=2048), len(names), width=2048, base=base)
        assert again.configs() == pattern.configs()
