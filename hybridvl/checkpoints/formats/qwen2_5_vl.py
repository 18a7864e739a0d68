"""Qwen2.5-VL as transformers writes it: nested or flat configuration, names as published or as of the modules."""

from __future__ import annotations

from typing import Any

from hybridvl.checkpoints.formats.base import Format, Values, vision_language_names
from hybridvl.checkpoints.formats.layer_kinds import (
    attention_options,
    attention_values,
    first_attention,
    first_of,
    layers_of,
    mixer_names,
)
from hybridvl.checkpoints.formats.values import require, whole
from hybridvl.checkpoints.formats.vision import (
    read_rotary,
    read_vision,
    read_visual_tokens,
    write_vision,
    write_visual_tokens,
    written_sections,
)
from hybridvl.layers import ConfigError, MixerConfig
from hybridvl.layers.full import FullAttentionConfig
from hybridvl.layers.swa import SlidingWindowConfig
from hybridvl.models.config import ModelConfig

_KINDS: dict[type[MixerConfig], str] = {FullAttentionConfig: "full_attention", SlidingWindowConfig: "sliding_attention"}


def _read_tied(values: Values) -> bool | None:
    found = [part.get("tie_word_embeddings") for part in (values, values.get("text_config") or {})]
    return any(found) if any(tied is not None for tied in found) else None


def _read_config(values: Values, tied: bool, place: str) -> ModelConfig:
    text = {**values, **(values.get("text_config") or {})}
    layers, width = whole(text, "num_hidden_layers", place), whole(text, "hidden_size", place)
    require(text, "hidden_act", "silu", place)
    kinds, window = text.get("layer_types"), text.get("sliding_window")
    if kinds is None:
        first = text.get("max_window_layers", 80) if text.get("use_sliding_window") and window else layers
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    names = mixer_names(kinds, layers, place, tuple(_KINDS.values()))
    attention = attention_options({**text, "head_dim": None}, place)
    mixers = {"full": attention, "swa": {**attention, "window": window}}
    return ModelConfig(
        pattern=" ".join(names),
        mixers={name: options for name, options in mixers.items() if name in names},
        width=width,
        mlp_width=whole(text, "intermediate_size", place),
        vocab_size=whole(text, "vocab_size", place),
        tie_embeddings=tied,
        norm_eps=text.get("rms_norm_eps", 1e-5),
        vision=read_vision(values, width, place),
        **read_rotary(text, place),
        **read_visual_tokens(values),
    )


def _write_config(config: ModelConfig) -> dict[str, Any]:
    layers = layers_of(config, "qwen2_5_vl", _KINDS)
    if config.mlp_width == 0:
        raise ConfigError("format 'qwen2_5_vl': mlp_width is 0, which it cannot express; expected at least 1")
    attention, sliding = first_attention(layers), first_of(layers, SlidingWindowConfig())
    if attention.head_dim * attention.heads != config.width:
        raise ConfigError(
            f"format 'qwen2_5_vl': head_dim {attention.head_dim}, which it cannot express; expected width / heads = "
            f"{config.width} / {attention.heads}"
        )
    kinds = [kind for kind, _ in layers]
    slides = "sliding_attention" in kinds
    text = {
        "attention_dropout": 0.0,
        "bos_token_id": 151643 if config.vocab_size > 151643 else None,
        "eos_token_id": 151645 if config.vocab_size > 151645 else None,
        "hidden_act": "silu",
        "hidden_size": config.width,
        "initializer_range": config.init_std,
        "intermediate_size": config.mlp_width,
        "layer_types": kinds,
        "max_position_embeddings": 128000,
        "max_window_layers": kinds.index("sliding_attention") if slides else len(kinds),
        "model_type": "qwen2_5_vl_text",
        **attention_values(attention),
        "num_hidden_layers": len(kinds),
        "pad_token_id": None,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {
            "mrope_section": written_sections(config, attention),
            "rope_theta": config.rope_theta,
            "rope_type": "default",
        },
        "sliding_window": sliding.window if slides else None,
        "use_cache": True,
        "use_sliding_window": slides,
        "vocab_size": config.vocab_size,
    }
    vision = write_vision(config, "qwen2_5_vl")
    theta = config.vision.rope_theta if config.vision else None
    vision_extra = {"model_type": "qwen2_5_vl_vision", "rope_parameters": {"rope_theta": theta, "rope_type": "axial"}}
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "text_config": text,
        "tie_word_embeddings": config.tie_embeddings,
        "vision_config": {**vision, **vision_extra},
        **write_visual_tokens(config),
    }


QWEN2_5_VL = Format(
    name="qwen2_5_vl",
    model_types=("qwen2_5_vl",),
    spellings=(
        vision_language_names("visual.", "model."),
        vision_language_names("model.visual.", "model.language_model."),
    ),
    read_config=_read_config,
    write_config=_write_config,
    read_tied=_read_tied,
    dtype_key="dtype",
)
