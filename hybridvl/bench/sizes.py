"""Sizes of the models that are measured: head sizes that fit a width, unless the mixers' options say otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybridvl.layers.errors import ConfigError
from hybridvl.models.config import ModelConfig, VisionConfig


def model_config(
    pattern: str,
    width: int,
    mlp_width: int,
    vocab_size: int,
    mixers: Mapping[str, Mapping[str, Any]] | None = None,
) -> ModelConfig:
    """A text model; heads of 128 from a width of 512 on, else of 64 or, below 128, of 16, as many as fill the width.

    mixers: options that come before these, by mixer.
    """
    if width % 16:
        raise ConfigError(f"--width {width}: expected a multiple of 16")
    dim = next(dim for dim in ((128, 64, 32, 16) if width >= 512 else (64, 32, 16)) if width % dim == 0)
    if width < 128:
        dim = 16
    heads = width // dim
    attention = {"heads": heads, "kv_heads": 2 if heads % 2 == 0 else 1, "head_dim": dim}
    chosen: dict[str, dict[str, Any]] = {
        "full": attention,
        "swa": dict(attention),
        "gdn": {"heads": heads, "head_dim": dim},
        "mamba2": {"head_dim": min(64, dim), "state_dim": 128 if dim == 128 else 64},
    }
    for name, options in (mixers or {}).items():
        chosen[name] = {**chosen.get(name, {}), **options}
    return ModelConfig(pattern=pattern, mixers=chosen, width=width, mlp_width=mlp_width, vocab_size=vocab_size)


def vision_config(depth: int, width: int) -> VisionConfig:
    """A vision tower in the proportions of Qwen2.5-VL's, which is the one of depth 32 and width 1280."""
    if width % 16:
        raise ConfigError(f"--vision-width {width}: expected a multiple of 16")
    dim = next(dim for dim in (80, 64, 32, 16) if width % dim == 0)
    return VisionConfig(
        depth=depth,
        width=width,
        heads=width // dim,
        mlp_width=width * 3420 // 1280,
        full_attention_blocks=tuple(range(7, depth, 8)) or (depth - 1,),
    )
