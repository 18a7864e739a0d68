"""What decoders of Gated DeltaNet alone have in common, in Qwen3-Next's and OLMo-Hybrid's terms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hybridvl.checkpoints.formats.base import Piece
from hybridvl.checkpoints.formats.layer_kinds import first_of, layer_configs, layer_count
from hybridvl.checkpoints.formats.values import Values, listed, real, require, whole
from hybridvl.layers import ConfigError
from hybridvl.layers.gdn import GatedDeltaNetConfig
from hybridvl.models.config import ModelConfig


def read_delta_net(values: Values, tied: bool, options: dict[str, Any]) -> ModelConfig:
    """A decoder whose layers are all Gated DeltaNet; `options` are those of the mixer that `values` do not hold."""
    require(values, "hidden_act", "silu")
    key_dim, value_dim = (whole(values, f"linear_{kind}_head_dim") for kind in ("key", "value"))
    mixer = {
        "heads": whole(values, "linear_num_key_heads"),
        "value_heads": whole(values, "linear_num_value_heads"),
        "head_dim": key_dim,
        "expand_v": value_dim / key_dim,
        "conv_width": whole(values, "linear_conv_kernel_dim", 4),
        **options,
    }
    return ModelConfig(
        pattern=" ".join(["gdn"] * layer_count(values)),
        mixers={"gdn": mixer},
        width=whole(values, "hidden_size"),
        mlp_width=whole(values, "intermediate_size"),
        vocab_size=whole(values, "vocab_size"),
        tie_embeddings=tied,
        norm_eps=real(values, "rms_norm_eps", 1e-6),
    )


def refuse_attention(values: Values, why: str) -> None:
    """Every layer must be linear_attention; by default every fourth one is not."""
    layers, every = layer_count(values), whole(values, "full_attention_interval", 4)
    default = ["linear_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    kinds = listed(values, "layer_types", default)
    if len(kinds) != layers:
        raise ConfigError(f"{len(kinds)} layer_types; expected num_hidden_layers = {layers}")
    for index, kind in enumerate(kinds):
        if kind != "linear_attention":
            raise ConfigError(
                f"layer_types: layer {index} is {kind!r}, {why}; expected 'linear_attention' in every layer"
            )


def conv_pieces(config: ModelConfig, ours: str) -> list[Piece]:
    """The three short convolutions out of one over queries, keys and values; `ours` is the mixer's prefix."""
    options = first_of(layer_configs(config), GatedDeltaNetConfig())
    keys, values, width = options.key_width, options.value_width, options.conv_width
    whole_shape = (2 * keys + values, 1, width)
    parts = (("q", 0, keys), ("k", keys, keys), ("v", 2 * keys, values))
    return [Piece(f"{ours}{name}_conv1d.weight", whole_shape, _rows(start, rows)) for name, start, rows in parts]


def _rows(start: int, count: int) -> Callable[[Tensor], Tensor]:
    def cut(tensor: Tensor) -> Tensor:
        return tensor[start : start + count]

    return cut
