"""Configurations and tensor names of other projects' checkpoints (Qwen2.5-VL, InfiniteVL, Mamba2) in our terms."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hybridvl.layers import ConfigError
from hybridvl.models.config import ModelConfig, VisionConfig

Values = Mapping[str, Any]

# Both spellings: names as published on the hub, and names of the modules inside transformers.
_VISION_LANGUAGE_NAMES = (
    (r"^(model\.)?visual\.", "visual."),
    (r"^(model\.)?language_model\.(model\.)?", "decoder."),
    (r"^model\.", "decoder."),
    (r"(^decoder\.layers\.\d+\.)input_layernorm\.", r"\1mixer_norm."),
    (r"(^decoder\.layers\.\d+\.)self_attn\.", r"\1mixer."),
    (r"(^decoder\.layers\.\d+\.)post_attention_layernorm\.", r"\1mlp_norm."),
)
_MAMBA_NAMES = (
    (r"^backbone\.embeddings\.", "decoder.embed_tokens."),
    (r"^backbone\.norm_f\.", "decoder.norm."),
    (r"^backbone\.", "decoder."),
    (r"(^decoder\.layers\.\d+\.)norm\.", r"\1mixer_norm."),
)
_LAYER_TYPES = {"full_attention": "full", "sliding_attention": "swa", "linear_attention": "gdn"}


def translate_config(values: Values, tensor_names: Iterable[str], place: str) -> ModelConfig:
    """Our configuration for another project's config.json; `tensor_names` settles whether the head is tied."""
    tied = values.get("tie_word_embeddings")
    tied = "lm_head.weight" not in set(tensor_names) if tied is None else bool(tied)
    return _translator(values, place)(values, tied, place)


def translate_name(name: str, values: Values, place: str) -> str:
    """Our name for a tensor of another project's checkpoint."""
    rules = _MAMBA_NAMES if _translator(values, place) is _mamba2 else _VISION_LANGUAGE_NAMES
    for found, ours in rules:
        name = re.sub(found, ours, name)
    return name


def _translator(values: Values, place: str) -> Callable[[Values, bool, str], ModelConfig]:
    known = {"qwen2_5_vl": _qwen2_5_vl, "infinite_vl": _infinitevl, "infinitevl": _infinitevl, "mamba2": _mamba2}
    kind = values.get("model_type")
    if kind not in known:
        raise ConfigError(f"{place}: model_type {kind!r}; expected one of {', '.join(known)}, or our own 'pattern'")
    return known[kind]


def _qwen2_5_vl(values: Values, tied: bool, place: str) -> ModelConfig:
    text = {**values, **(values.get("text_config") or {})}
    layers = _int(text, "num_hidden_layers", place)
    kinds = text.get("layer_types")
    if kinds is None:
        first = text.get("max_window_layers", layers) if text.get("use_sliding_window") else layers
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    attention = _attention_options(text, place)
    mixers = {"full": attention, "swa": {**attention, "window": text.get("sliding_window")}}
    return _vision_language_model(values, text, kinds, mixers, tied, place)


def _infinitevl(values: Values, tied: bool, place: str) -> ModelConfig:
    text = {"head_dim": 128, "sliding_window": 8192, **values, **(values.get("text_config") or {})}
    layers = _int(text, "num_hidden_layers", place)
    kinds = text.get("layer_types") or ["linear_attention" if i % 4 else "sliding_attention" for i in range(layers)]
    heads = text.get("num_linear_heads", 16)
    grouped = text.get("num_linear_key_value_heads", heads)
    if grouped != heads:
        raise ConfigError(f"{place}: num_linear_key_value_heads {grouped}; expected num_linear_heads = {heads}")
    attention = _attention_options(text, place)
    mixers = {
        "full": attention,
        "swa": {**attention, "window": text["sliding_window"]},
        "gdn": {
            "heads": heads,
            "head_dim": text.get("linear_head_dim", 128),
            "expand_v": float(text.get("expand_v", 2)),
            "conv_width": text.get("conv_size", 4),
            "norm_eps": text.get("norm_eps", 1e-5),
        },
    }
    return _vision_language_model(values, text, kinds, mixers, tied, place)


def _mamba2(values: Values, tied: bool, place: str) -> ModelConfig:
    width, expand = _int(values, "hidden_size", place), values.get("expand", 2)
    head_dim, eps = _int(values, "head_dim", place), values.get("layer_norm_epsilon", 1e-5)
    _require(values, "num_heads", width * expand // head_dim, place)
    _require(values, "rms_norm", True, place)
    _require(values, "hidden_act", "silu", place)
    low, high = (_number(limit) for limit in values.get("time_step_limit", (0.0, math.inf)))
    if low > 0 or high < math.inf:
        raise ConfigError(f"{place}: time_step_limit {[low, high]}; expected no limit, [0, Infinity]")
    mixer = {
        "expand": expand,
        "head_dim": head_dim,
        "state_dim": _int(values, "state_size", place),
        "groups": values.get("n_groups", 8),
        "conv_width": values.get("conv_kernel", 4),
        "conv_bias": values.get("use_conv_bias", True),
        "proj_bias": values.get("use_bias", False),
        "norm_eps": eps,
    }
    return ModelConfig(
        pattern=_pattern(["mamba2"] * _int(values, "num_hidden_layers", place)),
        mixers={"mamba2": mixer},
        width=width,
        mlp_width=0,
        vocab_size=_int(values, "vocab_size", place),
        tie_embeddings=tied,
        norm_eps=eps,
    )


def _vision_language_model(
    values: Values, text: Values, kinds: list[str], mixers: dict[str, dict[str, Any]], tied: bool, place: str
) -> ModelConfig:
    unknown = sorted(set(kinds) - set(_LAYER_TYPES))
    if unknown:
        raise ConfigError(f"{place}: layer_types {unknown}; expected {', '.join(_LAYER_TYPES)}")
    if len(kinds) != text["num_hidden_layers"]:
        raise ConfigError(
            f"{place}: {len(kinds)} layer_types; expected num_hidden_layers = {text['num_hidden_layers']}"
        )
    names = [_LAYER_TYPES[kind] for kind in kinds]
    _require(text, "hidden_act", "silu", place)
    rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
    if rope.get("rope_type", rope.get("type", "mrope")) not in ("default", "mrope"):
        raise ConfigError(f"{place}: rope type {rope.get('rope_type')!r}; expected 'mrope' or 'default'")
    sections = rope.get("mrope_section")
    vision = values.get("vision_config") or {}
    tokens = {
        name: values[name] for name in ("image_token_id", "video_token_id", "vision_start_token_id") if name in values
    }
    return ModelConfig(
        pattern=_pattern(names),
        mixers={name: options for name, options in mixers.items() if name in names},
        width=_int(text, "hidden_size", place),
        mlp_width=_int(text, "intermediate_size", place),
        vocab_size=_int(text, "vocab_size", place),
        tie_embeddings=tied,
        norm_eps=text.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta") or text.get("rope_theta") or 1e6),
        rope_sections=None if sections is None else tuple(sections),
        vision=_vision(vision, text["hidden_size"], f"{place}: vision_config"),
        tokens_per_second=float(vision.get("tokens_per_second", 4)),
        **tokens,
    )


def _vision(values: Values, out_width: int, place: str) -> VisionConfig:
    _require(values, "hidden_act", "silu", place)
    if values.get("out_hidden_size", out_width) != out_width:
        raise ConfigError(f"{place}: out_hidden_size {values['out_hidden_size']}; expected hidden_size = {out_width}")
    return VisionConfig(
        depth=values.get("depth", 32),
        width=_int(values, "hidden_size", place),
        heads=values.get("num_heads", 16),
        mlp_width=values.get("intermediate_size", 3420),
        patch_size=values.get("patch_size", 14),
        temporal_patch_size=values.get("temporal_patch_size", 2),
        spatial_merge_size=values.get("spatial_merge_size", 2),
        window_size=values.get("window_size", 112),
        full_attention_blocks=tuple(values.get("fullatt_block_indexes", (7, 15, 23, 31))),
        channels=values.get("in_channels", values.get("in_chans", 3)),
        rope_theta=float((values.get("rope_parameters") or {}).get("rope_theta", 1e4)),
    )


def _attention_options(text: Values, place: str) -> dict[str, Any]:
    heads = _int(text, "num_attention_heads", place)
    head_dim = text.get("head_dim") or _int(text, "hidden_size", place) // heads
    return {"heads": heads, "kv_heads": text.get("num_key_value_heads") or heads, "head_dim": head_dim}


def _pattern(names: list[str]) -> str:
    return " ".join(names)


def _int(values: Values, key: str, place: str) -> int:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{place}: {key} {value!r}; expected a whole number")
    return value


def _require(values: Values, key: str, accepted: object, place: str) -> None:
    if values.get(key, accepted) != accepted:
        raise ConfigError(f"{place}: {key} {values[key]!r}; expected {accepted!r}")


def _number(value: object) -> float:
    """A JSON number, or transformers' spelling of one that JSON lacks: {"__float__": "Infinity"}."""
    return float(value["__float__"]) if isinstance(value, Mapping) else float(value)  # type: ignore[arg-type]
