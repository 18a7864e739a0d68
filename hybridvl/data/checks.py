"""Checks of single settings, shared by the images' and the videos' configurations and by the parts of messages."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from hybridvl.layers.errors import ConfigError

Config = TypeVar("Config")

LARGEST = 2**53
"""Largest whole number in a setting: up to it every one is a float, too."""


def require_whole(place: str, value: object) -> None:
    """Raise ConfigError, calling the value `place`, unless it is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
        raise ConfigError(f"{place}: {value!r:.80}; expected a whole number from 1 to 2**53")


def require_rate(place: str, value: object) -> None:
    """Raise ConfigError, calling the value `place`, unless it is a number of times a second that a video can have."""
    if not is_finite(value) or not 1e-6 <= value <= 1e6:  # type: ignore[operator]
        raise ConfigError(f"{place}: {value!r:.80}; expected a number from 1e-6 to 1e6")


def is_finite(value: object) -> bool:
    """Whether a value is a number, neither infinite nor NaN nor True or False nor beyond what a float holds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) <= LARGEST


def from_settings(cls: type[Config], values: object, place: str) -> Config:
    """A configuration from what a JSON file holds; ConfigError names `place` and a key or value that is none."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{place}: {values!r:.80}; expected an object")
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ConfigError(f"{place}: unknown key {unknown[0]!r:.80}; expected one of {', '.join(known)}")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error


def with_options(config: Config, options: Mapping[str, Any], known: Sequence[str], place: str) -> Config:
    """The configuration with what one part of a message sets for itself; None leaves a setting as it is.

    Raises:
        ConfigError: an option that is not `known`, or a value that the configuration refuses.
    """
    given = {name: value for name, value in options.items() if value is not None}
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ConfigError(f"{place}: option {unknown[0]!r:.80}; expected one of {', '.join(known)}")
    try:
        return dataclasses.replace(config, **given) if given else config  # type: ignore[type-var]
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error
