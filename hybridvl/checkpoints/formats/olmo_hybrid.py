"""OLMo-Hybrid decoders: those of Gated DeltaNet alone are ours, its attention layers are not."""

from __future__ import annotations

import re

from hybridvl.checkpoints.formats.base import Format, Names, Piece, vision_language_names
from hybridvl.checkpoints.formats.delta_net import conv_pieces, read_delta_net, refuse_attention
from hybridvl.checkpoints.formats.values import Values, flag, whole
from hybridvl.models.config import ModelConfig

_CONV = re.compile(r"model\.layers\.(\d+)\.linear_attn\.conv1d\.weight")
_PUBLISHED = Names(
    ("decoder.embed_tokens.", "model.embed_tokens."),
    ("decoder.layers.{n}.mixer_norm.", "model.layers.{n}.attention_layer_norm."),
    ("decoder.layers.{n}.mixer.", "model.layers.{n}.linear_attn."),
    ("decoder.layers.{n}.mlp_norm.", "model.layers.{n}.feedforward_layer_norm."),
    ("decoder.layers.{n}.mlp.", "model.layers.{n}.mlp."),
    ("decoder.norm.", "model.norm."),
    ("lm_head.", "lm_head."),
)


def _read_config(values: Values, tied: bool) -> ModelConfig:
    refuse_attention(values, "which norms queries and keys over all heads, and its output instead of its input")
    heads = whole(values, "num_attention_heads", 30)
    keys = whole(values, "linear_num_key_heads", heads)
    key_dim = whole(values, "linear_key_head_dim", int(0.75 * whole(values, "hidden_size") / keys))
    filled = {
        **values,
        "linear_num_key_heads": keys,
        "linear_num_value_heads": whole(values, "linear_num_value_heads", heads),
        "linear_key_head_dim": key_dim,
        "linear_value_head_dim": whole(values, "linear_value_head_dim", 2 * key_dim),
    }
    options = {"negative_eigenvalues": flag(values, "linear_allow_neg_eigval", True), "norm_eps": 1e-5}
    return read_delta_net(filled, tied, options)


def _pieces(config: ModelConfig, name: str) -> list[Piece]:
    found = _CONV.fullmatch(name)
    return [] if found is None else conv_pieces(config, f"decoder.layers.{found[1]}.mixer.")


OLMO_HYBRID = Format(
    name="olmo_hybrid",
    model_types=("olmo_hybrid",),
    spellings=(_PUBLISHED, vision_language_names("visual.", "model.", mixer="linear_attn")),
    read_config=_read_config,
    pieces=_pieces,
)
