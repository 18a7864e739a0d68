"""InfiniteVL as published: a flat configuration that leaves out what is the default, and Qwen2.5-VL's names."""

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
    whole_if_possible,
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


def _read_config(values: Values, tied: bool, place: str) -> ModelConfig:
    text = {"head_dim": 128, "sliding_window": 8192, **values, **(values.get("text_config") or {})}
    layers, width = whole(text, "num_hidden_layers", place), whole(text, "hidden_size", place)
    require(text, "hidden_act", "silu", place)
    kinds = text.get("layer_types") or ["linear_attention" if i % 4 else "sliding_attention" for i in range(layers)]
    names = mixer_names(kinds, layers, place)
    heads = text.get("num_linear_heads", 16)
    grouped = text.get("num_linear_key_value_heads", heads)
    if grouped != heads:
        raise ConfigError(f"{place}: num_linear_key_value_heads {grouped}; expected num_linear_heads = {heads}")
    attention = attention_options(text, place)
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
    return ModelConfig(
        pattern=" ".join(names),
        mixers={name: options for name, options in mixers.items() if name in names},
        width=width,
        mlp_width=whole(text, "intermediate_size", place),
        vocab_size=whole(text, "vocab_size", place),
        tie_embeddings=tied,
        norm_eps=text.get("rms_norm_eps", 1e-6),
        vision=read_vision(values, width, place),
        **read_rotary(text, place),
        **read_visual_tokens(values),
    )


def _write_config(config: ModelConfig) -> dict[str, Any]:
    layers = layers_of(config, "infinitevl", _KINDS)
    if config.mlp_width == 0:
        raise ConfigError("format 'infinitevl': mlp_width is 0, which it cannot express; expected at least 1")
    attention = first_attention(layers)
    linear, sliding = first_of(layers, GatedDeltaNetConfig()), first_of(layers, SlidingWindowConfig())
    return {
        "architectures": ["InfiniteVLQwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "auto_map": _AUTO_MAP,
        "bos_token_id": 151643 if config.vocab_size > 151643 else None,
        "conv_size": linear.conv_width,
        "eos_token_id": 151645 if config.vocab_size > 151645 else None,
        "expand_v": whole_if_possible(linear.expand_v),
        "head_dim": attention.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.width,
        "initializer_range": config.init_std,
        "intermediate_size": config.mlp_width,
        "layer_types": [kind for kind, _ in layers],
        "linear_head_dim": linear.head_dim,
        "max_position_embeddings": 128000,
        "max_window_layers": len(layers),
        "model_type": "infinite_vl",
        "norm_eps": linear.norm_eps,
        **attention_values(attention),
        "num_hidden_layers": len(layers),
        "num_linear_heads": linear.heads,
        "num_linear_key_value_heads": linear.heads,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": {"mrope_section": written_sections(config, attention), "rope_type": "default"},
        "rope_theta": config.rope_theta,
        "sliding_window": sliding.window,
        "tie_word_embeddings": config.tie_embeddings,
        "use_sliding_window": True,
        "vision_config": {**write_vision(config, "infinitevl"), "model_type": "infinite_vl"},
        "vocab_size": config.vocab_size,
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
