"""What a mixer can take over from softmax attention: parts of its projections, and one rule for each type of mixer.

A mixer offers a rule beside its configuration (`qkvo_rule`). In all rules head h of H new heads belongs to head
h // (H / S) of the source's S query heads, or to head h * (S / H) where there are fewer; it takes that head's query
rows, the key and value rows of its key/value head (so grouped heads are repeated in head order), and its output
columns, divided by H / S where heads are repeated, so that their sum is what it was. Of heads of another dim, the first
min(new, old) rows or columns are inherited; the rest of a wider new head is new, the rest of a wider old head is left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from hybridvl.layers.base import MixerConfig
from hybridvl.layers.errors import ConfigError

if TYPE_CHECKING:  # which has a rule of its own
    from hybridvl.layers.softmax_attention import AttentionConfig


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
Rule = Callable[[Any, "AttentionConfig", int], list[Piece]]

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


def rule_of(config: MixerConfig) -> Rule | None:
    """The rule of a mixer's type or of the nearest type that it is derived from."""
    return next((_RULES[cls] for cls in type(config).__mro__ if cls in _RULES), None)


def source_heads(config: MixerConfig, option: str, heads: int, source: AttentionConfig) -> list[int]:
    """The source's query head that each of `heads` new heads belongs to; ConfigError, naming the option, if neither
    number divides the other."""
    if heads % source.heads and source.heads % heads:
        raise ConfigError(
            f"{config.name}.{option}: {heads} heads cannot inherit from {source.heads} query heads; "
            "expected a multiple or a divisor of them, or inherit: none"
        )
    return [head * source.heads // heads for head in range(heads)]


def key_value_heads(heads: Sequence[int], source: AttentionConfig) -> list[int]:
    """The key/value heads that the source's query heads read."""
    return [head * source.kv_heads // source.heads for head in heads]


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
