"""What a mixer can take over from the layer it replaces: which rows and columns of which tensors go where.

Inheritance "none" copies a layer that stays what it is (or only gains or loses a window) and nothing else; "qkvo" also
hands the query, key, value and output projections of softmax attention to what takes its place, by one rule per mixer
type (the rules are at the end). In all rules head h of H new heads belongs to head h // (H / S) of the source's S query
heads, or to head h * (S / H) where there are fewer; it takes that head's query rows, the key and value rows of its
key/value head (so grouped heads are repeated in head order), and its output columns, divided by H / S where heads are
repeated, so that their sum is what it was. Of heads of another dim, the first min(new, old) rows or columns are
inherited; the rest of a wider new head is new, the rest of a wider old head is left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hybridvl.layers.base import MixerConfig
from hybridvl.layers.errors import ConfigError
from hybridvl.layers.gdn import GatedDeltaNetConfig
from hybridvl.layers.mamba2 import Mamba2Config
from hybridvl.layers.parallel import ParallelConfig
from hybridvl.layers.softmax_attention import AttentionConfig

INHERIT = ("none", "qkvo")

# Options that leave the weights what they are: they change what is computed with them, or how they were drawn.
_WEIGHTLESS = frozenset(
    {"window", "backend", "norm_eps", "rope", "negative_eigenvalues"}
    | {"dt_min", "dt_max", "dt_floor", "A_min", "A_max"}
)


@dataclass(frozen=True)
class Piece:
    """A part of one of the source mixer's tensors, and its place in one of the new mixer's.

    Attributes:
        target, source: names of tensors within the mixers, "v_proj.weight".
        into: indices in the target along the axis; taken: as many indices in the source, which go there in order.
        axis: 0 = rows, 1 = columns, in both tensors.
        scale: factor of the values.
    """

    target: str
    source: str
    into: Sequence[int]
    taken: Sequence[int]
    axis: int = 0
    scale: float = 1.0


ConfigT = TypeVar("ConfigT", bound=MixerConfig)
Rule = Callable[[Any, AttentionConfig, int], list[Piece]]

_RULES: dict[type[MixerConfig], Rule] = {}


def qkvo_rule(
    cls: type[ConfigT],
) -> Callable[[Callable[[ConfigT, AttentionConfig, int], list[Piece]]], Rule]:
    """Decorator: the function says what a mixer of this configuration class (or a subclass without a rule of its own)
    takes over from softmax attention: (its configuration, the attention's, model width D) -> pieces."""

    def add(rule: Callable[[ConfigT, AttentionConfig, int], list[Piece]]) -> Rule:
        _RULES[cls] = rule
        return rule

    return add


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
    rule = next((_RULES[cls] for cls in type(config).__mro__ if cls in _RULES), None)
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


def source_heads(config: MixerConfig, option: str, heads: int, source: AttentionConfig) -> list[int]:
    """The source's query head that each of `heads` new heads belongs to; ConfigError, naming the option, if neither
    number divides the other."""
    if heads % source.heads and source.heads % heads:
        raise ConfigError(
            f"{config.name}.{option}: {heads} heads cannot inherit from {source.heads} query heads; "
            "expected a multiple or a divisor of them, or inherit: none"
        )
    return [head * source.heads // heads for head in range(heads)]


def head_piece(
    target: str, source: str, heads: Sequence[int], dims: tuple[int, int], axis: int = 0, start: int = 0
) -> Piece:
    """The piece in which new head h takes the first rows (or columns) of the source's head heads[h].

    dims: of a new head and of a source head. start: where the new heads begin in the target. Columns of heads that
    are taken several times are divided by that number.
    """
    new, old = dims
    shared = range(min(new, old))
    into = [start + number * new + row for number in range(len(heads)) for row in shared]
    taken = [head * old + row for head in heads for row in shared]
    repeats = len(heads) // len(set(heads))
    return Piece(target, source, into, taken, axis, 1 / repeats if axis else 1.0)


def _weights(config: MixerConfig) -> tuple[object, ...]:
    """Whatever of a configuration says what its weights are."""
    if isinstance(config, ParallelConfig):
        return (ParallelConfig, *map(_weights, config.branches))
    family = AttentionConfig if isinstance(config, AttentionConfig) else type(config)
    options = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in _WEIGHTLESS}
    if isinstance(config, GatedDeltaNetConfig):
        options["value_heads"] = config.value_head_count  # null stands for heads
    return (family, tuple(sorted(options.items())))


def _key_value(heads: Sequence[int], source: AttentionConfig) -> list[int]:
    """The key/value heads that the source's query heads read."""
    return [head * source.kv_heads // source.heads for head in heads]


@qkvo_rule(AttentionConfig)  # type: ignore[type-abstract]
def _attention(config: AttentionConfig, source: AttentionConfig, width: int) -> list[Piece]:
    """Attention of another geometry: a key/value head takes what the first of its query heads reads."""
    queries = source_heads(config, "heads", config.heads, source)
    grouped = _key_value(queries[:: config.heads // config.kv_heads], source)
    dims = (config.head_dim, source.head_dim)
    pieces = [head_piece("o_proj.weight", "o_proj.weight", queries, dims, axis=1)]
    for kind in ("weight", *(["bias"] if config.qkv_bias and source.qkv_bias else [])):
        for name, heads in (("q_proj", queries), ("k_proj", grouped), ("v_proj", grouped)):
            pieces.append(head_piece(f"{name}.{kind}", f"{name}.{kind}", heads, dims))
    if config.out_bias and source.out_bias:
        pieces.append(Piece("o_proj.bias", "o_proj.bias", range(width), range(width)))
    if config.qk_norm and source.qk_norm:
        pieces += [head_piece(name, name, [0], dims) for name in ("q_norm.weight", "k_norm.weight")]
    return pieces


@qkvo_rule(GatedDeltaNetConfig)
def _gated_delta_net(config: GatedDeltaNetConfig, source: AttentionConfig, width: int) -> list[Piece]:
    """q <- q, k <- k, v <- v, o <- o; it has no biases. Its gate, decay, rate, convolutions and norm are new."""
    keys = source_heads(config, "heads", config.heads, source)
    values = source_heads(config, "value_heads", config.value_head_count, source)
    key_dims, value_dims = (config.head_dim, source.head_dim), (config.value_dim, source.head_dim)
    return [
        head_piece("q_proj.weight", "q_proj.weight", keys, key_dims),
        head_piece("k_proj.weight", "k_proj.weight", _key_value(keys, source), key_dims),
        head_piece("v_proj.weight", "v_proj.weight", _key_value(values, source), value_dims),
        head_piece("o_proj.weight", "o_proj.weight", values, value_dims, axis=1),
    ]


@qkvo_rule(Mamba2Config)
def _mamba2(config: Mamba2Config, source: AttentionConfig, width: int) -> list[Piece]:
    """C <- q, B <- k, x <- v, out_proj <- o (arXiv 2408.15237); a group takes what the first of its heads would."""
    count, inner = config.heads(width), config.expand * width
    values = source_heads(config, "head_dim", count, source)
    grouped = values[:: count // config.groups]
    value_dims, state_dims = (config.head_dim, source.head_dim), (config.state_dim, source.head_dim)
    after_x = 2 * inner  # rows of in_proj: z, x, B, C, dt
    parts = (
        ("v_proj", _key_value(values, source), value_dims, inner),
        ("k_proj", _key_value(grouped, source), state_dims, after_x),
        ("q_proj", grouped, state_dims, after_x + config.groups * config.state_dim),
    )
    pieces = [head_piece("out_proj.weight", "o_proj.weight", values, value_dims, axis=1)]
    for kind in ("weight", *(["bias"] if config.proj_bias and source.qkv_bias else [])):
        for name, heads, dims, start in parts:
            pieces.append(head_piece(f"in_proj.{kind}", f"{name}.{kind}", heads, dims, start=start))
    if config.proj_bias and source.out_bias:
        pieces.append(Piece("out_proj.bias", "o_proj.bias", range(width), range(width)))
    return pieces
