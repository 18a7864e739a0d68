"""InfiniteVL as published: a flat configuration that leaves out what is the default, and Qwen2.5-VL's names."""

from __future__ import annotations

from typing import Any

from hybridvl.checkpoints.formats.base import Format, vision_language_names
from hybridvl.checkpoints.formats.layer_kinds import (
    attention_options,
    first_attention,
    first_of,
    layer_count,
    layers_of,
    mixer_names,
)
from hybridvl.checkpoints.formats.values import Values, real, require, section, whole
from hybridvl.checkpoints.formats.vision import (
    read_vision_language,
    whole_if_possible,
    write_text,
    write_vision,
    write_visual_tokens,
    written_sections,
)
from hybridvl.layers import ConfigError, MixerConfig
from hybridvl.layers.full import FullAttentionConfig
from hybridvl.layers.gdn import GatedDeltaNetConfig
from hybridvl.layers.swa import SlidingWindowConfig
from hybridvl.models.config import ModelConfig

_KINDS: dict[type[MixerConfig], str] = {
    FullAttentionConfig: "full_attention",
    SlidingWindowConfig: "sliding_attention",
    GatedDeltaNetConfig: "linear_attention",
}
_CODE = "modeling_infinitevl.InfiniteVLQwen2_5_VLForConditionalGeneration"
_AUTO_MAP = {
    "AutoConfig": "configuration_infinitevl.InfiniteVLConfig",
    "AutoModel": _CODE,
    "AutoModelForCausalLM": _CODE,
    "AutoProcessor": "Qwen2_5_VLProcessor",
}


def _read_config(values: Values, tied: bool) -> ModelConfig:
    text = {"head_dim": 128, **values, **section(values, "text_config")}
    layers = layer_count(text)
    require(text, "hidden_act", "silu")
    kinds = text.get("layer_types") or ["linear_attention" if i % 4 else "sliding_attention" for i in range(layers)]
    heads = whole(text, "num_linear_heads", 16)
    grouped = whole(text, "num_linear_key_value_heads", heads)
    if grouped != heads:
        raise ConfigError(f"num_linear_key_value_heads {grouped}; expected num_linear_heads = {heads}")
    attention = attention_options(text)
    mixers = {
        "full": attention,
        "swa": {**attention, "window": whole(text, "sliding_window", 8192)},
        "gdn": {
            "heads": heads,
            "head_dim": whole(text, "linear_head_dim", 128),
            "expand_v": real(text, "expand_v", 2.0),
            "conv_width": whole(text, "conv_size", 4),
            "norm_eps": real(text, "norm_eps", 1e-5),
        },
    }
    return read_vision_language(values, text, mixer_names(kinds, layers), mixers, tied, eps=1e-6)


def _write_config(config: ModelConfig) -> dict[str, Any]:
    layers = layers_of(config, "infinitevl", _KINDS)
    attention = first_attention(layers)
    linear, sliding = first_of(layers, GatedDeltaNetConfig()), first_of(layers, SlidingWindowConfig())
    return {
        "architectures": ["InfiniteVLQwen2_5_VLForConditionalGeneration"],
        **write_text(config, [kind for kind, _ in layers], attention, "infinitevl"),
        "auto_map": _AUTO_MAP,
        "conv_size": linear.conv_width,
        "expand_v": whole_if_possible(linear.expand_v),
        "head_dim": attention.head_dim,
        "linear_head_dim": linear.head_dim,
        "max_window_layers": len(layers),
        "model_type": "infinite_vl",
        "norm_eps": linear.norm_eps,
        "num_linear_heads": linear.heads,
        "num_linear_key_value_heads": linear.heads,
        "rope_scaling": {"mrope_section": written_sections(config, layers), "rope_type": "default"},
        "rope_theta": config.rope_theta,
        "sliding_window": sliding.window,
        "tie_word_embeddings": config.tie_embeddings,
        "use_sliding_window": True,
        "vision_config": {**write_vision(config, "infinitevl"), "model_type": "infinite_vl"},
        **write_visual_tokens(config),
    }


INFINITEVL = Format(
    name="infinitevl",
    model_types=("infinite_vl", "infinitevl"),
    spellings=(
        vision_language_names("visual.", "model."),
        vision_language_names("model.visual.", "model.language_model."),
    ),
    read_config=_read_config,
    write_config=_write_config,
    dtype_key="torch_dtype",
)
