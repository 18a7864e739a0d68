"""Qwen2.5-VL as transformers writes it: nested or flat configuration, names as published or as of the modules."""

from __future__ import annotations

from typing import Any

from hybridvl.checkpoints.formats.base import Format, read_flag, vision_language_names
from hybridvl.checkpoints.formats.layer_kinds import (
    attention_options,
    first_attention,
    first_of,
    layer_count,
    layers_of,
    mixer_names,
)
from hybridvl.checkpoints.formats.values import Values, flag, require, section, whole
from hybridvl.checkpoints.formats.vision import (
    read_vision_language,
    write_text,
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
    found = [read_flag(part, "tie_word_embeddings") for part in (values, section(values, "text_config"))]
    return any(found) if any(tied is not None for tied in found) else None


def _read_config(values: Values, tied: bool) -> ModelConfig:
    text = {**values, **section(values, "text_config")}
    layers, kinds = layer_count(text), text.get("layer_types")
    require(text, "hidden_act", "silu")
    if kinds is None:
        slides = flag(text, "use_sliding_window", False) and text.get("sliding_window") is not None
        first = whole(text, "max_window_layers", 80, least=0) if slides else layers
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    names = mixer_names(kinds, layers, tuple(_KINDS.values()))
    attention = attention_options({**text, "head_dim": None})
    mixers = {"full": attention}
    if "swa" in names:
        mixers["swa"] = {**attention, "window": whole(text, "sliding_window")}
    return read_vision_language(values, text, names, mixers, tied, eps=1e-5)


def _write_config(config: ModelConfig) -> dict[str, Any]:
    layers = layers_of(config, "qwen2_5_vl", _KINDS)
    attention, sliding = first_attention(layers), first_of(layers, SlidingWindowConfig())
    kinds = [kind for kind, _ in layers]
    slides = "sliding_attention" in kinds
    text = {
        **write_text(config, kinds, attention, "qwen2_5_vl"),
        "max_window_layers": kinds.index("sliding_attention") if slides else len(kinds),
        "model_type": "qwen2_5_vl_text",
        "pad_token_id": None,
        "rope_parameters": {
            "mrope_section": written_sections(config, layers),
            "rope_theta": config.rope_theta,
            "rope_type": "default",
        },
        "sliding_window": sliding.window if slides else None,
        "use_cache": True,
        "use_sliding_window": slides,
    }
    if attention.head_dim * attention.heads != config.width:
        raise ConfigError(
            f"format 'qwen2_5_vl': head_dim {attention.head_dim}, which it cannot express; expected width / heads = "
            f"{config.width} / {attention.heads}"
        )
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
