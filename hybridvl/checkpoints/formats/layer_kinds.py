"""Layers in other projects' terms: layer_types and attention sizes read and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from hybridvl.checkpoints.formats.values import Values, whole
from hybridvl.layers import ConfigError, MixerConfig
from hybridvl.layers.full import FullAttentionConfig
from hybridvl.layers.softmax_attention import AttentionConfig
from hybridvl.models.config import ModelConfig
from hybridvl.pattern import parse_pattern
from hybridvl.pattern.syntax import MAX_LAYERS

Layers = Sequence[tuple[str, MixerConfig]]
Mixer = TypeVar("Mixer", bound=MixerConfig)
LAYER_TYPES = {"full_attention": "full", "sliding_attention": "swa", "linear_attention": "gdn"}


def mixer_names(kinds: object, layers: int, accepted: Sequence[str] = tuple(LAYER_TYPES)) -> list[str]:
    """The mixer of every layer, from a list of layer_types."""
    if not isinstance(kinds, list | tuple) or len(kinds) != layers:
        found = f"{len(kinds)} layer_types" if isinstance(kinds, list | tuple) else f"layer_types {kinds!r}"
        raise ConfigError(f"{found}; expected num_hidden_layers = {layers}")
    unknown = sorted({str(kind) for kind in kinds} - set(accepted))
    if unknown:
        raise ConfigError(f"layer_types {unknown}; expected {', '.join(accepted)}")
    return [LAYER_TYPES[kind] for kind in kinds]


def layer_configs(config: ModelConfig) -> list[tuple[str, MixerConfig]]:
    """Every layer's text in the pattern, and its resolved options."""
    pattern = parse_pattern(config.pattern, config.mixers)
    return list(zip(pattern.layers, pattern.configs(config.mixers, path="mixers"), strict=True))


def layers_of(
    config: ModelConfig, format: str, kinds: Mapping[type[MixerConfig], str]
) -> list[tuple[str, MixerConfig]]:
    """Every layer as their name for its kind, and its options; ConfigError names the first layer that has none."""
    found = []
    for index, (text, options) in enumerate(layer_configs(config)):
        if type(options) not in kinds:
            known = ", ".join(kind.__name__.removesuffix("Config") for kind in kinds)
            raise ConfigError(f"format {format!r}: layer {index} is {text}, which it cannot express; it has {known}")
        found.append((kinds[type(options)], options))
    return found


def first_of(layers: Layers, default: Mixer) -> Mixer:
    """The options of the first layer whose mixer is of the default's kind, else the default."""
    return next((options for _, options in layers if isinstance(options, type(default))), default)


def layer_count(values: Values) -> int:
    """num_hidden_layers."""
    return whole(values, "num_hidden_layers", most=MAX_LAYERS)


def attention_options(text: Values) -> dict[str, Any]:
    """heads, kv_heads and head_dim of attention layers."""
    heads = whole(text, "num_attention_heads")
    head_dim = whole(text, "head_dim", whole(text, "hidden_size") // heads)
    return {"heads": heads, "kv_heads": whole(text, "num_key_value_heads", heads), "head_dim": head_dim}


def first_attention(layers: Layers) -> AttentionConfig:
    """The options of the first attention layer of any kind, else the defaults."""
    attention = (options for _, options in layers if isinstance(options, AttentionConfig))
    return next(attention, FullAttentionConfig())


def attention_values(options: AttentionConfig) -> dict[str, Any]:
    """The inverse of `attention_options`, head_dim apart."""
    return {"num_attention_heads": options.heads, "num_key_value_heads": options.kv_heads}
