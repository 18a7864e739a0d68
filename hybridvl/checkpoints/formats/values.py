"""Values of config.json, read with messages that name the key, the value and what is accepted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybridvl.layers import ConfigError
from hybridvl.models.config import MAX_SIZE

Values = Mapping[str, Any]


def whole(values: Values, key: str, default: int | None = None, least: int = 1, most: int = MAX_SIZE) -> int:
    """A whole number; without a default it must be there. Here and below, null is as good as left out."""
    value = _given(values, key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(f"{key} {_shown(value)}; expected a whole number from {least} to {most}")
    return value


def real(values: Values, key: str, default: float) -> float:
    """A finite number above 0."""
    value = _given(values, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
        raise ConfigError(f"{key} {_shown(value)}; expected a finite number above 0")
    return float(value)


def flag(values: Values, key: str, default: bool) -> bool:
    """true or false."""
    value = _given(values, key, default)
    if not isinstance(value, bool):
        raise ConfigError(f"{key} {_shown(value)}; expected true or false")
    return value


def section(values: Values, key: str) -> Values:
    """An object; an empty one where it is left out."""
    value = _given(values, key, {})
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key} {_shown(value)}; expected an object")
    return value


def listed(values: Values, key: str, default: Sequence[Any]) -> list[Any]:
    """A list; what its items are is the caller's business."""
    value = _given(values, key, default)
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{key} {_shown(value)}; expected a list")
    return list(value)


def require(values: Values, key: str, accepted: object) -> None:
    """Refuse any other value of an option that has one meaning in our models."""
    if values.get(key, accepted) != accepted:
        raise ConfigError(f"{key} {_shown(values[key])}; expected {accepted!r}")


def _given(values: Values, key: str, default: object) -> Any:
    value = values.get(key)
    return default if value is None else value


def _shown(value: object) -> str:
    """A value as a message repeats it: not at the length of a page."""
    if isinstance(value, int) and abs(value) >= 10**40:
        return "a number of more than 40 digits"  # Python refuses to print very long ones
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
