"""Checks of mixer options that say which field is wrong, what it holds and what is accepted."""

from __future__ import annotations

import dataclasses
import types
import typing

from hybridvl.layers.base import MixerConfig
from hybridvl.layers.errors import ConfigError


def check_types(config: MixerConfig) -> None:
    """Raise ConfigError for the first field whose value lacks its annotated type (an int passes for a float)."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        expect(config, field.name, _fits(getattr(config, field.name), hint), _spell(hint))


def expect(config: MixerConfig, field: str, holds: bool, accepted: str) -> None:
    """Raise ConfigError naming the field, its value and `accepted` unless `holds`."""
    if not holds:
        place = config.name or type(config).__name__
        raise ConfigError(f"{place}.{field} = {getattr(config, field)!r}: expected {accepted}")


def expect_at_least(config: MixerConfig, least: int, *fields: str) -> None:
    """Raise ConfigError for the first of the integer fields that is below `least`."""
    for field in fields:
        expect(config, field, getattr(config, field) >= least, f"an integer of at least {least}")


def expect_positive(config: MixerConfig, *fields: str) -> None:
    """Raise ConfigError for the first of the fields that is not above zero and finite."""
    for field in fields:
        expect(config, field, 0 < getattr(config, field) < float("inf"), "a number above 0")


def _fits(value: object, hint: object) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, typing.get_origin(hint) or hint)  # type: ignore[arg-type]


def _spell(hint: object) -> str:
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string", types.NoneType: "null"}
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_spell(option) for option in typing.get_args(hint))
    return names.get(hint, str(hint))  # type: ignore[call-overload]
