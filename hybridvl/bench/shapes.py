"""Shapes as the tables of papers write them: letters with sizes, "B1 T2048 H16 K128"."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from hybridvl.layers.errors import ConfigError

_PART = re.compile(r"([A-Za-z]+)(\d+)([KM]?)")
_FACTORS = {"": 1, "K": 1024, "M": 1024**2}


def parse_shape(text: str, defaults: Mapping[str, int], place: str = "--shape") -> dict[str, int]:
    """Sizes by letter, those that the text leaves out from `defaults`: "T8192 V256", commas or spaces between.

    Raises ConfigError for a letter that `defaults` does not have, and for sizes below 1.
    """
    sizes = dict(defaults)
    for part in re.split(r"[\s,]+", text.strip()):
        if not part:
            continue
        match = _PART.fullmatch(part)
        if match is None:
            raise ConfigError(f"{place} {part!r}: expected a letter and a size, such as T2048 or T2K")
        if match[1] not in defaults:
            raise ConfigError(f"{place} {part!r}: unknown letter {match[1]!r}; expected {', '.join(defaults)}")
        sizes[match[1]] = int(match[2]) * _FACTORS[match[3]]
        if sizes[match[1]] < 1:
            raise ConfigError(f"{place} {part!r}: expected a size of at least 1")
    return sizes


def parse_lengths(texts: Sequence[str], place: str, least: int = 1) -> list[int]:
    """Numbers of tokens: "1024", "4K", "1M"; ascending, each once."""
    found = set()
    for text in texts:
        match = re.fullmatch(r"(\d+)([KM]?)", text.upper())
        if match is None or int(match[1]) < least:
            raise ConfigError(f"{place} {text!r}: expected a number of tokens such as 2048 or 4K")
        found.add(int(match[1]) * _FACTORS[match[2]])
    return sorted(found)
