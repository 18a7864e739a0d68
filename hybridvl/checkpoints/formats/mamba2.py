"""Mamba2 language models as transformers writes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from hybridvl.checkpoints.formats.base import Format, Names
from hybridvl.checkpoints.formats.layer_kinds import first_of, layer_count, layers_of
from hybridvl.checkpoints.formats.values import Values, flag, listed, real, require, whole
from hybridvl.layers import ConfigError
from hybridvl.layers.mamba2 import Mamba2Config
from hybridvl.models.config import ModelConfig

# Our option, their key, the default when the key is left out.
_OPTIONS: tuple[tuple[str, str, Any], ...] = (
    ("expand", "expand", 2),
    ("head_dim", "head_dim", 64),
    ("state_dim", "state_size", 128),
    ("groups", "n_groups", 8),
    ("conv_width", "conv_kernel", 4),
    ("conv_bias", "use_conv_bias", True),
    ("proj_bias", "use_bias", False),
    ("norm_eps", "layer_norm_epsilon", 1e-5),
)
_READERS: dict[type, Callable[..., Any]] = {int: whole, float: real, bool: flag}
_INFINITY = {"__float__": "Infinity"}  # transformers' spelling of what JSON lacks


def _read_config(values: Values, tied: bool) -> ModelConfig:
    options = {ours: _READERS[type(default)](values, theirs, default) for ours, theirs, default in _OPTIONS}
    width = whole(values, "hidden_size")
    require(values, "num_heads", width * options["expand"] // options["head_dim"])
    require(values, "rms_norm", True)
    require(values, "hidden_act", "silu")
    limits = listed(values, "time_step_limit", (0.0, math.inf))
    if limits not in ([0, math.inf], [0, _INFINITY]):
        raise ConfigError(f"time_step_limit {limits}; expected no limit, [0, Infinity]")
    return ModelConfig(
        pattern=" ".join(["mamba2"] * layer_count(values)),
        mixers={"mamba2": options},
        width=width,
        mlp_width=0,
        vocab_size=whole(values, "vocab_size"),
        tie_embeddings=tied,
        norm_eps=options["norm_eps"],
    )


def _write_config(config: ModelConfig) -> dict[str, Any]:
    layers = layers_of(config, "mamba2", {Mamba2Config: "mamba2"})
    if config.vision is not None:
        raise ConfigError("format 'mamba2': the model has a vision tower, which it cannot express; expected none")
    options = first_of(layers, Mamba2Config())
    return {
        "architectures": ["Mamba2ForCausalLM"],
        **{theirs: getattr(options, ours) for ours, theirs, _ in _OPTIONS},
        "hidden_act": "silu",
        "hidden_size": config.width,
        "initializer_range": config.init_std,
        "model_type": "mamba2",
        "num_heads": options.heads(config.width),
        "num_hidden_layers": len(layers),
        "residual_in_fp32": True,
        "rms_norm": True,
        "tie_word_embeddings": config.tie_embeddings,
        "time_step_limit": [0.0, _INFINITY],
        "vocab_size": config.vocab_size,
    }


def _names(embedding: str) -> Names:
    return Names(
        ("decoder.embed_tokens.", f"backbone.{embedding}."),
        ("decoder.layers.{n}.mixer_norm.", "backbone.layers.{n}.norm."),
        ("decoder.layers.{n}.mixer.", "backbone.layers.{n}.mixer."),
        ("decoder.norm.", "backbone.norm_f."),
        ("lm_head.", "lm_head."),
    )


MAMBA2 = Format(
    name="mamba2",
    model_types=("mamba2",),
    spellings=(_names("embeddings"), _names("embedding")),
    read_config=_read_config,
    write_config=_write_config,
    ignored=frozenset(
        {
            *("rope_theta", "rope_sections", "tokens_per_second", "video_convention"),
            *("image_token_id", "video_token_id", "vision_start_token_id"),
        }
    ),
    dtype_key="dtype",
)
