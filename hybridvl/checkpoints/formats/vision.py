"""The vision tower, the rotary positions and the visual tokens in configurations of Qwen2.5-VL and its relatives."""

from __future__ import annotations

from typing import Any

from hybridvl.checkpoints.formats.base import Values
from hybridvl.checkpoints.formats.values import require, whole
from hybridvl.layers import ConfigError
from hybridvl.layers.softmax_attention import AttentionConfig
from hybridvl.models.config import ModelConfig, VisionConfig
from hybridvl.models.positions import rotary_sections

# Our field, their key, the default when the key is left out.
_VISION_FIELDS: tuple[tuple[str, str, Any], ...] = (
    ("depth", "depth", 32),
    ("heads", "num_heads", 16),
    ("mlp_width", "intermediate_size", 3420),
    ("patch_size", "patch_size", 14),
    ("temporal_patch_size", "temporal_patch_size", 2),
    ("spatial_merge_size", "spatial_merge_size", 2),
    ("window_size", "window_size", 112),
)
_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id")


def read_vision(values: Values, out_width: int, place: str) -> VisionConfig:
    """The vision tower from `vision_config`."""
    vision = values.get("vision_config") or {}
    place = f"{place}: vision_config"
    require(vision, "hidden_act", "silu", place)
    if vision.get("out_hidden_size", out_width) != out_width:
        raise ConfigError(f"{place}: out_hidden_size {vision['out_hidden_size']}; expected hidden_size = {out_width}")
    return VisionConfig(
        width=whole(vision, "hidden_size", place),
        full_attention_blocks=tuple(vision.get("fullatt_block_indexes", (7, 15, 23, 31))),
        channels=vision.get("in_channels", vision.get("in_chans", 3)),
        rope_theta=float((vision.get("rope_parameters") or {}).get("rope_theta", 1e4)),
        **{ours: vision.get(theirs, default) for ours, theirs, default in _VISION_FIELDS},
    )


def write_vision(config: ModelConfig, format: str) -> dict[str, Any]:
    """The inverse of `read_vision`: `vision_config` without its model_type."""
    vision = config.vision
    if vision is None:
        raise ConfigError(f"format {format!r}: vision is null, which it cannot express; expected a vision tower")
    return {
        **{theirs: getattr(vision, ours) for ours, theirs, _ in _VISION_FIELDS},
        "hidden_size": vision.width,
        "hidden_act": "silu",
        "out_hidden_size": config.width,
        "fullatt_block_indexes": list(vision.full_attention_blocks),
        "in_channels": vision.channels,
        "initializer_range": config.init_std,
        "tokens_per_second": whole_if_possible(config.tokens_per_second),
    }


def read_visual_tokens(values: Values) -> dict[str, Any]:
    """Our fields for the visual tokens, and for how videos are placed in time."""
    vision = values.get("vision_config") or {}
    return {
        **{name: values[name] for name in _TOKENS if name in values},
        "tokens_per_second": float(vision.get("tokens_per_second", 4)),
        "video_convention": values.get("video_convention", "v457"),
    }


def write_visual_tokens(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_visual_tokens`, tokens_per_second apart.

    The files of other projects have no word for video_convention, it is the reading library's: ours is an extra key.
    """
    tokens = {name: getattr(config, name) for name in _TOKENS}
    end = {"vision_end_token_id": config.vision_start_token_id + 1}
    convention = {} if config.video_convention == "v457" else {"video_convention": config.video_convention}
    return {**tokens, **end, **convention}


def read_rotary(text: Values, place: str) -> dict[str, Any]:
    """rope_theta and rope_sections from rope_scaling, rope_parameters or rope_theta."""
    rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "mrope"))
    if kind not in ("default", "mrope"):
        raise ConfigError(f"{place}: rope type {kind!r}; expected 'mrope' or 'default'")
    sections = rope.get("mrope_section")
    theta = rope.get("rope_theta") or text.get("rope_theta") or 1e6
    return {"rope_theta": float(theta), "rope_sections": None if sections is None else tuple(sections)}


def written_sections(config: ModelConfig, attention: AttentionConfig) -> list[int]:
    """mrope_section, spelled out."""
    return list(rotary_sections(attention.head_dim, config.rope_sections))


def whole_if_possible(value: float) -> int | float:
    """2 for 2.0: some readers insist on whole numbers."""
    return int(value) if float(value).is_integer() else value
