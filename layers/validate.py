"""Checks of mixer options that say which field is wrong, what it holds and what is accepted."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing

from hybridvl.layers.base import MixerConfig
from hybridvl.layers.errors import ConfigError

MAX_INT = 2**31 - 1  # of heads, dims and windows: larger than any that can be built


def check_types(config: MixerConfig) -> None:
    """Raise ConfigError for the first field whose value lacks its annotated type (an int passes for a float)."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        expect(config, field.name, fits(getattr(config, field.name), hint), spell(hint))


def expect(config: MixerConfig, field: str, holds: bool, accepted: str) -> None:
    """Raise ConfigError naming the field, its value and `accepted` unless `holds`."""
    if not holds:
        place = config.name or type(config).__name__
        raise ConfigError(f"{place}.{field} = {getattr(config, field)!r}: expected {accepted}")


def check_width(config: MixerConfig, width: int) -> None:
    """Raise ConfigError unless the model width is a positive integer."""
    if not (fits(width, int) and width >= 1):
        raise ConfigError(f"{config.name}: width = {width!r}: expected an integer of at least 1")


def expect_at_least(config: MixerConfig, least: int, *fields: str) -> None:
    """Raise ConfigError for the first of the integer fields that is below `least`, or beyond all sizes."""
    for field in fields:
        expect(config, field, getattr(config, field) >= least, f"an integer of at least {least}")
        expect(config, field, getattr(config, field) <= MAX_INT, f"an integer of at most {MAX_INT}")


def expect_positive(config: MixerConfig, *fields: str) -> None:
    """Raise ConfigError for the first of the fields that is not above zero and finite."""
    for field in fields:
        expect(config, field, 0 < getattr(config, field) <= sys.float_info.max, "a number above 0")


def fits(value: object, hint: object) -> bool:
    """Whether a value has an annotated type: a class, a union, Literal, or a tuple or list of those."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if hint is typing.Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in options)
    if origin is typing.Literal:
        return any(type(value) is type(option) and value == option for option in options)
    if origin is tuple and isinstance(value, tuple):
        each = options[:1] * len(value) if options[1:] == (...,) else options
        return len(each) == len(value) and all(map(fits, value, each))
    if origin is list and isinstance(value, list):
        return all(fits(item, options[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)  # type: ignore[arg-type]


def spell(hint: object) -> str:
    """An annotated type in words: "an integer or null"."""
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string", types.NoneType: "null"}
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(spell(option) for option in options)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, options))}"
    return names.get(hint, str(hint))  # type: ignore[call-overload]
