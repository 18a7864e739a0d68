"""What a checkpoint format is: a configuration and tensor names, each in both directions."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hybridvl.checkpoints.formats.values import Values, flag
from hybridvl.layers.errors import ConfigError, within
from hybridvl.models.config import ModelConfig


def read_flag(values: Values, key: str) -> bool | None:
    """true or false, None where it is left out."""
    return None if values.get(key) is None else flag(values, key, False)


class Names:
    """One spelling of tensor names: pairs of our prefix and theirs, where "{n}" stands for a layer's number."""

    def __init__(self, *pairs: tuple[str, str]) -> None:
        self._to_ours = [(_prefix(theirs), ours) for ours, theirs in pairs]
        self._to_theirs = [(_prefix(ours), theirs) for ours, theirs in pairs]

    def ours(self, name: str) -> str | None:
        """Our name for one of theirs; None if it is not of this spelling."""
        return _replaced(name, self._to_ours)

    def theirs(self, name: str) -> str | None:
        """Their name for one of ours; None if this spelling has none."""
        return _replaced(name, self._to_theirs)


@dataclass(frozen=True)
class Piece:
    """A tensor of ours that is computed from one of theirs, where the two projects cut their weights differently.

    ours: its name. whole: the shape that theirs must have. make: theirs to ours.
    """

    ours: str
    whole: tuple[int, ...]
    make: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Format:
    """How one project writes checkpoints.

    Attributes:
        name: what `save` calls it.
        model_types: values of model_type in config.json.
        spellings: names of tensors; all are read, the first is written.
        read_config: (their values, is the head tied) to our configuration; ConfigErrors name the key.
        write_config: our configuration to their values, ConfigError for what they cannot say; None: only models that
            were loaded from this format can be written.
        read_tied: whether the head is tied, None if the values leave it to the tensors' names.
        pieces: our configuration and one of their names to the tensors of ours that are cut out of it, if any are.
        ignored: fields of our configuration that mean nothing to models of this format.
        dtype_key: the key of config.json that holds the weights' dtype, None if there is none.
    """

    name: str
    model_types: tuple[str, ...]
    spellings: tuple[Names, ...]
    read_config: Callable[[Values, bool], ModelConfig]
    write_config: Callable[[ModelConfig], dict[str, Any]] | None = None
    read_tied: Callable[[Values], bool | None] = lambda values: read_flag(values, "tie_word_embeddings")
    pieces: Callable[[ModelConfig, str], list[Piece]] = lambda config, name: []
    ignored: frozenset[str] = frozenset()
    dtype_key: str | None = None

    def config(self, values: Values, tied: bool, place: str) -> ModelConfig:
        """Our configuration for their values; ConfigErrors begin with the place."""
        with within(place):
            return self.read_config(values, tied)

    def ours(self, name: str) -> str | None:
        """Our name for one of theirs in any of the spellings, None if it is in none."""
        return next((ours for spelling in self.spellings if (ours := spelling.ours(name)) is not None), None)

    def theirs(self, name: str) -> str:
        """Their name, as it is written, for one of ours; ConfigError if the format has no place for it."""
        found = self.spellings[0].theirs(name)
        if found is None:
            raise ConfigError(f"format {self.name!r} has no name for the tensor {name}")
        return found


def vision_language_names(visual: str, text: str, mixer: str = "self_attn") -> Names:
    """Qwen2.5-VL's names, with the prefixes of the vision tower and of the decoder."""
    layer = text + "layers.{n}."
    return Names(
        ("visual.", visual),
        ("decoder.embed_tokens.", text + "embed_tokens."),
        ("decoder.layers.{n}.mixer_norm.", layer + "input_layernorm."),
        ("decoder.layers.{n}.mixer.", f"{layer}{mixer}."),
        ("decoder.layers.{n}.mlp_norm.", layer + "post_attention_layernorm."),
        ("decoder.layers.{n}.mlp.", layer + "mlp."),
        ("decoder.norm.", text + "norm."),
        ("lm_head.", "lm_head."),
    )


def _prefix(text: str) -> tuple[re.Pattern[str], bool]:
    return re.compile(re.escape(text).replace(r"\{n\}", r"(\d+)")), "{n}" in text


def _replaced(name: str, rules: list[tuple[tuple[re.Pattern[str], bool], str]]) -> str | None:
    for (pattern, numbered), other in rules:
        found = pattern.match(name)
        if found is not None:
            start = other.replace("{n}", found[1]) if numbered else other
            return start + name[found.end() :]
    return None
