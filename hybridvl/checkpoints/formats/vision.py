"""What configurations of Qwen2.5-VL and its relatives share: vision tower, rotary positions, visual tokens, sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybridvl.checkpoints.formats.layer_kinds import Layers, attention_values, first_attention
from hybridvl.checkpoints.formats.values import Values, listed, real, require, section, whole
from hybridvl.layers.errors import ConfigError, within
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


def read_vision_language(
    values: Values, text: Values, names: Sequence[str], mixers: Mapping[str, dict[str, Any]], tied: bool, eps: float
) -> ModelConfig:
    """The configuration of a decoder with a vision tower.

    Args:
        values: of config.json.
        text: of the decoder, wherever they stand.
        names: every layer's mixer.
        mixers: their options; those of other mixers are left out.
        tied: whether the head is the embedding.
        eps: of the norms where the values do not say.
    """
    width, vision = whole(text, "hidden_size"), section(values, "vision_config")
    with within("vision_config"):
        tower, seconds = _read_vision(vision, width), real(vision, "tokens_per_second", 4.0)
    return ModelConfig(
        pattern=" ".join(names),
        mixers={name: options for name, options in mixers.items() if name in names},
        width=width,
        mlp_width=whole(text, "intermediate_size"),
        vocab_size=whole(text, "vocab_size"),
        tie_embeddings=tied,
        norm_eps=real(text, "rms_norm_eps", eps),
        vision=tower,
        tokens_per_second=seconds,
        video_convention=values.get("video_convention", "v457"),
        **{name: values[name] for name in _TOKENS if name in values},
        **_read_rotary(text, mixers["full"]["head_dim"] if {"full", "swa"} & set(names) else None),
    )


def write_text(config: ModelConfig, kinds: Sequence[str], attention: AttentionConfig, format: str) -> dict[str, Any]:
    """What both formats say of the decoder, rotary positions apart; `kinds` are its layer_types."""
    if config.mlp_width == 0:
        raise ConfigError(f"format {format!r}: mlp_width is 0, which it cannot express; expected at least 1")
    return {
        "attention_dropout": 0.0,
        "bos_token_id": 151643 if config.vocab_size > 151643 else None,
        "eos_token_id": 151645 if config.vocab_size > 151645 else None,
        "hidden_act": "silu",
        "hidden_size": config.width,
        "initializer_range": config.init_std,
        "intermediate_size": config.mlp_width,
        "layer_types": list(kinds),
        "max_position_embeddings": 128000,
        **attention_values(attention),
        "num_hidden_layers": len(kinds),
        "rms_norm_eps": config.norm_eps,
        "vocab_size": config.vocab_size,
    }


def _read_vision(vision: Values, out_width: int) -> VisionConfig:
    require(vision, "hidden_act", "silu")
    if vision.get("out_hidden_size", out_width) != out_width:
        raise ConfigError(f"out_hidden_size {vision['out_hidden_size']!r}; expected hidden_size = {out_width}")
    with within("rope_parameters"):
        theta = real(section(vision, "rope_parameters"), "rope_theta", 1e4)
    return VisionConfig(
        width=whole(vision, "hidden_size"),
        full_attention_blocks=tuple(listed(vision, "fullatt_block_indexes", (7, 15, 23, 31))),
        channels=whole(vision, "in_channels", whole(vision, "in_chans", 3)),
        rope_theta=theta,
        **{ours: whole(vision, theirs, default) for ours, theirs, default in _VISION_FIELDS},
    )


def write_vision(config: ModelConfig, format: str) -> dict[str, Any]:
    """`vision_config` without its model_type, tokens_per_second included."""
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


def write_visual_tokens(config: ModelConfig) -> dict[str, Any]:
    """The visual tokens, and how videos are placed in time.

    The files of other projects have no word for video_convention, it is the reading library's: ours is an extra key.
    """
    tokens = {name: getattr(config, name) for name in _TOKENS}
    end = {"vision_end_token_id": config.vision_start_token_id + 1}
    convention = {} if config.video_convention == "v457" else {"video_convention": config.video_convention}
    return {**tokens, **end, **convention}


def _read_rotary(text: Values, head_dim: int | None) -> dict[str, Any]:
    """rope_theta and rope_sections from rope_scaling, rope_parameters or rope_theta; head_dim: of attention layers."""
    rope = {**section(text, "rope_scaling"), **section(text, "rope_parameters")}
    kind = rope.get("rope_type", rope.get("type", "mrope"))
    if kind not in ("default", "mrope"):
        raise ConfigError(f"rope type {kind!r}; expected 'mrope' or 'default'")
    theta = real(rope, "rope_theta", real(text, "rope_theta", 1e6))
    sections = listed(rope, "mrope_section", ())
    numbers = all(isinstance(section, int) and section >= 0 for section in sections)
    if sections and not (numbers and len(sections) == 3 and head_dim in (None, 2 * sum(sections))):
        half = "" if head_dim is None else f" that add up to head_dim / 2 = {head_dim / 2:g}"
        raise ConfigError(f"mrope_section {sections}; expected three whole numbers{half}")
    return {"rope_theta": theta, "rope_sections": tuple(sections) or None}


def written_sections(config: ModelConfig, layers: Layers) -> list[int]:
    """mrope_section, spelled out; where no layer turns anything, as it is in the configuration."""
    turned = any(options.rotary_dims for _, options in layers)
    if config.rope_sections is not None and not turned:
        return list(config.rope_sections)
    return list(rotary_sections(first_attention(layers).head_dim, config.rope_sections))


def whole_if_possible(value: float) -> int | float:
    """2 for 2.0: some readers insist on whole numbers."""
    return int(value) if float(value).is_integer() else value
