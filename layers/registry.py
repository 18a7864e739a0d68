"""The registry of mixers: built in, registered by decorator, named by import path, or found by entry point."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from hybridvl.layers.base import MixerConfig
from hybridvl.layers.errors import ConfigError

ENTRY_POINT_GROUP = "hybridvl.mixers"

MIXERS: dict[str, type[MixerConfig]] = {}
"""Registered name -> config class."""

ConfigT = TypeVar("ConfigT", bound=type[MixerConfig])


def register(name: str) -> Callable[[ConfigT], ConfigT]:
    """Class decorator: make a `MixerConfig` subclass available in patterns under `name`."""
    if not name.isidentifier():
        raise ConfigError(f"mixer name {name!r}: expected letters, digits and underscores, not starting with a digit")

    def add(cls: ConfigT) -> ConfigT:
        known = MIXERS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(f"mixer name {name!r} is taken by {known.__module__}.{known.__qualname__}")
        cls.name = name
        MIXERS[name] = cls
        return cls

    return add


def mixer_class(name: str) -> type[MixerConfig]:
    """The config class for a registered name, an entry point of the group 'hybridvl.mixers', or an import path.

    Raises ConfigError that names the nearest known mixer.
    """
    if name in MIXERS:
        return MIXERS[name]
    if "." in name:
        return _import_config(name)
    installed = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if name in installed:
        return register(name)(_load_config(name, installed[name]))
    known = known_mixers()
    near = difflib.get_close_matches(name, known, n=1)
    hint = f", did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"unknown mixer {name!r}{hint} (known: {', '.join(known)})")


def known_mixers() -> list[str]:
    """All names that `mixer_class` takes, import paths aside: the registered mixers and the installed entry points."""
    return sorted({*MIXERS, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))})


def _import_config(path: str) -> type[MixerConfig]:
    module_name, _, attribute = path.rpartition(".")
    if not all(part.isidentifier() for part in path.split(".")):
        raise ConfigError(
            f"mixer type {path!r}: expected a name or an import path such as my_package.my_module.MyConfig"
        )
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"mixer type {path!r} cannot be imported: {error}") from error
    return _checked(path, found)


def _load_config(name: str, point: EntryPoint) -> type[MixerConfig]:
    place = f"{name} (entry point {point.value} of {point.dist.name if point.dist else 'an unknown package'})"
    try:
        found = point.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"mixer {place} cannot be imported: {error}") from error
    return _checked(place, found)


def _checked(place: str, found: object) -> type[MixerConfig]:
    if not (isinstance(found, type) and issubclass(found, MixerConfig)):
        raise ConfigError(f"mixer type {place!r} is not a MixerConfig subclass")
    return found
