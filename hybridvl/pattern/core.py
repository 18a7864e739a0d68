"""Layer patterns as objects: parsed, compared, printed in canonical form, and resolved to mixer configurations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from hybridvl.layers import MixerConfig
from hybridvl.pattern.canonical import canonical
from hybridvl.pattern.errors import PatternError
from hybridvl.pattern.resolve import check_names, resolve
from hybridvl.pattern.syntax import MAX_LAYERS, LayerSpec, parse_layers

Mixers = Mapping[str, Mapping[str, Any]]


class Pattern:
    """What the layers of a model are made of; made by `parse_pattern` or `Pattern.from_layers`.

    Two patterns are equal if their layers are, however they were written.

    Attributes:
        source: the text as it was written.
        specs: the layers' mixers and options, with their places in the source.
    """

    def __init__(self, source: str, specs: list[LayerSpec]) -> None:
        self.source = source
        self.specs = tuple(specs)

    @classmethod
    def from_layers(cls, layers: Iterable[str], mixers: Mixers | None = None) -> Pattern:
        """The pattern of a list of layers such as `Pattern.layers`; raises PatternError that says which is wrong."""
        texts = list(layers)
        if not 1 <= len(texts) <= MAX_LAYERS:
            raise PatternError(f"layers: a list of {len(texts)}; expected 1 to {MAX_LAYERS}")
        for number, text in enumerate(texts):
            try:
                count = len(parse_layers(text))
            except PatternError as error:
                raise PatternError(f"layers[{number}]: {error}") from None
            if count > 1:
                raise PatternError(f"layers[{number}]: {text!r} is {count} layers; expected one")
        return parse_pattern(" ".join(texts), mixers)

    @cached_property
    def layers(self) -> list[str]:
        """Canonical text of each layer: "swa(window=16)", "swa+mamba2"."""
        return [spec.text for spec in self.specs]

    def configs(self, mixers: Mixers | None = None, path: str = "mixers") -> list[MixerConfig]:
        """The configuration of each layer's mixer; layers that read alike share one object.

        An option in the pattern overrides the named mixer's, which overrides the mixer's default.

        Args:
            mixers: named mixers and overrides of registered ones: {"wide": {"type": "swa", "window": 8192}}.
            path: where `mixers` stands in the user's file, for messages.

        Raises:
            PatternError: a mistake in the pattern's options, with a caret under it.
            ConfigError: a mistake in `mixers`, with its path.
        """
        return resolve(self.source, self.specs, {} if mixers is None else mixers, path)

    def __len__(self) -> int:
        return len(self.specs)

    def __str__(self) -> str:
        return self._canonical

    def __repr__(self) -> str:
        return f"Pattern({self._canonical!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pattern) and self.layers == other.layers

    def __hash__(self) -> int:
        return hash(self._canonical)

    @cached_property
    def _canonical(self) -> str:
        return canonical(self.layers)


def parse_pattern(text: str, mixers: Mixers | None = None) -> Pattern:
    """The pattern that a string such as "(swa gdn*3)*9" describes.

    Args:
        text: see `hybridvl.pattern.syntax` for the grammar.
        mixers: named mixers and overrides, whose names the pattern may use beside the registered ones.

    Raises:
        PatternError: with a caret under the mistake; unknown names come with the nearest known one.
    """
    specs = parse_layers(text)
    check_names(text, specs, {} if mixers is None else mixers)
    return Pattern(text, specs)
