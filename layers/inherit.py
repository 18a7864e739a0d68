"""What a layer takes over from the one that it replaces: which rows and columns of which tensors go where.

Inheritance "none" copies a layer that stays what it is (or only gains or loses a window) and nothing else; "qkvo" also
hands the query, key, value and output projections of softmax attention to what takes its place, by the rule that stands
beside each mixer (`hybridvl.layers.pieces` says what all rules have in common).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hybridvl.layers.base import MixerConfig
from hybridvl.layers.errors import ConfigError
from hybridvl.layers.parallel import ParallelConfig
from hybridvl.layers.pieces import Piece, rule_of
from hybridvl.layers.softmax_attention import AttentionConfig

INHERIT = ("none", "qkvo")


def same_weights(config: MixerConfig, source: MixerConfig) -> bool:
    """Whether a layer can go on with the source's tensors as they are: the same mixer, or full against sliding-window
    attention of one geometry; windows, backends and other options without weights may differ."""
    return _weights(config) == _weights(source)


def inherited_pieces(config: MixerConfig, source: MixerConfig, width: int, inherit: str = "qkvo") -> list[Piece]:
    """What a layer takes over from the one that it replaces, in a model of width D; nothing where no rule applies.

    Mixers side by side each follow their own rule.

    Args:
        config: the new layer.
        source: the layer in its place.
        width: model width D of both.
        inherit: "none" or "qkvo".

    Raises:
        ConfigError: an unknown inheritance, or numbers of heads that are no multiples of one another.
    """
    if inherit not in INHERIT:
        raise ConfigError(f"inherit = {inherit!r}: expected one of {', '.join(INHERIT)}")
    if same_weights(config, source):
        rows = {name: (*tensor.shape, 1)[0] for name, tensor in mixer_tensors(source, width).items()}  # scalars too
        return [Piece(name, name, range(count), range(count)) for name, count in rows.items()]
    if isinstance(config, ParallelConfig):
        return [
            dataclasses.replace(piece, target=f"branches.{number}.{piece.target}")
            for number, branch in enumerate(config.branches)
            for piece in inherited_pieces(branch, source, width, inherit)
        ]
    rule = rule_of(config)
    if inherit == "none" or rule is None or not isinstance(source, AttentionConfig):
        return []
    return rule(config, source, width)


def mixer_tensors(config: MixerConfig, width: int) -> dict[str, Tensor]:
    """The tensors of a mixer by name, on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        return dict(config.build(width).state_dict())


@torch.no_grad()
def inherit_weights(mixer: nn.Module, pieces: Sequence[Piece], source: Mapping[str, Tensor]) -> None:
    """Copy the pieces out of the source mixer's tensors into a mixer, in place; everything else stays as it is."""
    own = mixer.state_dict()
    for piece in pieces:
        target, values = own[piece.target], source[piece.source]
        taken = torch.as_tensor(piece.taken, device=values.device)
        values = values.index_select(piece.axis, taken).to(target)
        into = torch.as_tensor(piece.into, device=target.device)
        target.index_copy_(piece.axis, into, values if piece.scale == 1 else values * piece.scale)


def _weights(config: MixerConfig) -> tuple[object, ...]:
    """Whatever of a configuration says what its weights are."""
    if isinstance(config, ParallelConfig):
        return (ParallelConfig, *map(_weights, config.branches))
    family = AttentionConfig if isinstance(config, AttentionConfig) else type(config)
    return (family, config.weight_options())
