"""Values of other projects' config.json, read with messages that name the file, the key and what is accepted."""

from __future__ import annotations

from collections.abc import Mapping

from hybridvl.checkpoints.formats.base import Values
from hybridvl.layers import ConfigError


def whole(values: Values, key: str, place: str) -> int:
    """A required whole number of at least 1."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{place}: {key} {value!r}; expected a whole number of at least 1")
    return value


def require(values: Values, key: str, accepted: object, place: str) -> None:
    """Refuse any other value of an option that has one meaning in our models."""
    if values.get(key, accepted) != accepted:
        raise ConfigError(f"{place}: {key} {values[key]!r}; expected {accepted!r}")


def number(value: object) -> float:
    """A JSON number, or transformers' spelling of one that JSON lacks: {"__float__": "Infinity"}."""
    return float(value["__float__"]) if isinstance(value, Mapping) else float(value)  # type: ignore[arg-type]
