"""Qwen3-Next decoders: those of Gated DeltaNet and plain SwiGLUs are ours, attention and experts are not."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import Tensor

from hybridvl.checkpoints.formats.base import Format, Names, Piece
from hybridvl.checkpoints.formats.delta_net import conv_pieces, read_delta_net, refuse_attention
from hybridvl.checkpoints.formats.layer_kinds import first_of, layer_configs, layer_count
from hybridvl.checkpoints.formats.values import Values, listed, real, whole
from hybridvl.layers import ConfigError
from hybridvl.layers.gdn import GatedDeltaNetConfig
from hybridvl.layers.norms import at_least_float32
from hybridvl.models.config import ModelConfig

_DEFAULTS = {
    **{"linear_key_head_dim": 128, "linear_value_head_dim": 128},
    **{"linear_num_key_heads": 16, "linear_num_value_heads": 32},
}
_NAMES = Names(
    ("decoder.embed_tokens.", "model.embed_tokens."),
    ("decoder.layers.{n}.mixer_norm.", "model.layers.{n}.input_layernorm."),
    ("decoder.layers.{n}.mixer.o_norm.", "model.layers.{n}.linear_attn.norm."),
    ("decoder.layers.{n}.mixer.o_proj.", "model.layers.{n}.linear_attn.out_proj."),
    ("decoder.layers.{n}.mixer.", "model.layers.{n}.linear_attn."),
    ("decoder.layers.{n}.mlp_norm.", "model.layers.{n}.post_attention_layernorm."),
    ("decoder.layers.{n}.mlp.", "model.layers.{n}.mlp."),
    ("decoder.norm.", "model.norm."),
    ("lm_head.", "lm_head."),
)
_CENTRED = re.compile(r"model\.(layers\.\d+\.(input|post_attention)_layer)?norm\.weight")
_FUSED = re.compile(r"model\.layers\.(\d+)\.linear_attn\.(in_proj_qkvz|in_proj_ba|conv1d)\.weight")


def _read_config(values: Values, tied: bool) -> ModelConfig:
    values = {**_DEFAULTS, **{key: value for key, value in values.items() if value is not None}}
    refuse_attention(values, "whose output gate and zero-centred norms our attention lacks")
    experts, step = whole(values, "num_experts", 512, least=0), whole(values, "decoder_sparse_step", 1)
    dense = listed(values, "mlp_only_layers", [])
    for index in range(layer_count(values)):
        if experts and (index + 1) % step == 0 and index not in dense:
            raise ConfigError(
                f"num_experts {experts}: layer {index} is a mixture of experts; expected num_experts 0, or "
                "every layer in mlp_only_layers"
            )
    return read_delta_net(values, tied, {"norm_eps": real(values, "rms_norm_eps", 1e-6)})


def _pieces(config: ModelConfig, name: str) -> list[Piece]:
    ours = _NAMES.ours(name) or name
    if _CENTRED.fullmatch(name):  # their norms multiply by 1 + weight, in float32
        return [Piece(ours, (config.width,), lambda weight: 1 + weight.to(at_least_float32(weight.dtype)))]
    fused = _FUSED.fullmatch(name)
    if fused is None:
        return []
    mixer = f"decoder.layers.{fused[1]}.mixer."
    if fused[2] == "conv1d":
        return conv_pieces(config, mixer)
    options = first_of(layer_configs(config), GatedDeltaNetConfig())
    group = options.value_head_count // options.heads
    keys, values = options.head_dim, group * options.value_dim
    sizes = {"q": keys, "k": keys, "v": values, "g": values} if fused[2] == "in_proj_qkvz" else {"b": group, "a": group}
    return _per_head(sizes, options.heads, config.width, mixer)


def _per_head(sizes: dict[str, int], heads: int, width: int, mixer: str) -> list[Piece]:
    """Projections that lie side by side for every key head: `sizes` rows each."""
    rows, start, found = sum(sizes.values()), 0, []
    for name, size in sizes.items():
        found.append(Piece(f"{mixer}{name}_proj.weight", (heads * rows, width), _head_rows(heads, start, size)))
        start += size
    return found


def _head_rows(heads: int, start: int, size: int) -> Callable[[Tensor], Tensor]:
    def cut(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (heads, -1))[:, start : start + size].flatten(0, 1)

    return cut


QWEN3_NEXT = Format(
    name="qwen3_next", model_types=("qwen3_next",), spellings=(_NAMES,), read_config=_read_config, pieces=_pieces
)
