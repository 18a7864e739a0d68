"""Which layers, options and sizes of two models' configurations differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from hybridvl.layers import ConfigError
from hybridvl.models.config import ModelConfig
from hybridvl.models.positions import rotary_sections
from hybridvl.pattern import parse_pattern

_LISTED = 8  # differences that an error message spells out
# What a model may change without its weights becoming another model's.
_FREE_FIELDS = {"pattern", "mixers", "init_std", "activation_checkpointing"}
_FREE_OPTIONS = {"backend"}
# Options that only say how fresh weights are drawn.
_INITIAL_OPTIONS = {"dt_min", "dt_max", "dt_floor", "A_min", "A_max"}


def check_same_model(saved: ModelConfig, own: ModelConfig, place: str) -> None:
    """Raise ConfigError that says which layers and sizes differ, if weights of `saved` do not fit `own`."""
    differences = [*_layer_differences(saved, own), *_size_differences(saved, own)]
    if differences:
        more = len(differences) - _LISTED
        listed = "; ".join(differences[:_LISTED]) + (f"; and {more} more" if more > 0 else "")
        raise ConfigError(
            f"{place}: a checkpoint of pattern {_canonical(saved)!r} does not fit a model of pattern "
            f"{_canonical(own)!r}: {listed}"
        )


def check_same_sizes(saved: ModelConfig, own: ModelConfig, place: str) -> None:
    """Raise ConfigError with both values of every size and setting outside the mixers in which two models differ."""
    differences = _size_differences(saved, own)
    if differences:
        raise ConfigError(f"{place}: {'; '.join(differences)}")


def lost_options(own: ModelConfig, read: ModelConfig, ignored: frozenset[str]) -> list[str]:
    """What of `own` was lost when it was written in a format and `read` again; `ignored` fields do not matter."""
    found: list[str] = []
    for number, (mine, theirs) in enumerate(zip(_layers(own), _layers(read), strict=True)):
        here, there = (_meaningful(side[1]) for side in (mine, theirs))
        lost = [f"{key} {value!r} ({there.get(key)!r} there)" for key, value in here.items() if there.get(key) != value]
        found += [f"layer {number}, {mine[0]}: {', '.join(lost)}"] if lost else []
    if found:
        return found[:_LISTED]
    sizes = {name: (getattr(own, name), getattr(read, name)) for name in _compared() if name != "vision"}
    sizes["rope_sections"] = _sections(own), _sections(read)
    if own.vision is not None and read.vision is not None:
        fields = [field.name for field in dataclasses.fields(own.vision)]
        sizes |= {f"vision.{name}": (getattr(own.vision, name), getattr(read.vision, name)) for name in fields}
    changed = {name: pair for name, pair in sizes.items() if name not in ignored and pair[0] != pair[1]}
    return [f"{name} {mine!r} ({theirs!r} there)" for name, (mine, theirs) in changed.items()]


def _layer_differences(saved: ModelConfig, own: ModelConfig) -> list[str]:
    found: list[str] = []
    pairs = zip_longest(_layers(saved), _layers(own))
    for number, (there, here) in enumerate(pairs):
        if there is None or here is None:
            found.append(f"{len(_layers(saved))} layers there, {len(_layers(own))} here")
            break
        if there[1] != here[1]:
            same_text = there[0] == here[0]
            texts = [_options(side[1], there[1], here[1]) if same_text else side[0] for side in (there, here)]
            found.append(f"layer {number} is {texts[0]} there, {texts[1]} here")
    return found


def _layers(config: ModelConfig) -> list[tuple[str, dict[str, Any]]]:
    """Every layer's text in the pattern and the options that it resolves to."""
    pattern = parse_pattern(config.pattern, config.mixers)
    resolved = pattern.configs(config.mixers, path="mixers")
    described = ({"type": type(layer).__name__, **_plain(dataclasses.asdict(layer))} for layer in resolved)
    return list(zip(pattern.layers, described, strict=True))


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in _FREE_OPTIONS}


def _options(side: Mapping[str, Any], there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in side.items() if there.get(key) != here.get(key))


def _size_differences(saved: ModelConfig, own: ModelConfig) -> list[str]:
    pairs = ((name, getattr(saved, name), getattr(own, name)) for name in _compared())
    return [f"{name} is {there} there, {here} here" for name, there, here in pairs if there != here]


def _canonical(config: ModelConfig) -> str:
    return str(parse_pattern(config.pattern, config.mixers))


def _meaningful(options: dict[str, Any]) -> dict[str, Any]:
    """A layer's options without those that make no difference to its weights or its outputs."""
    unused = {*_INITIAL_OPTIONS, *({"norm_eps"} if options.get("qk_norm") is False else ())}
    if options.get("value_heads") == options.get("heads"):
        unused.add("value_heads")
    return {key: value for key, value in options.items() if key not in unused and value is not None}


def _sections(config: ModelConfig) -> list[tuple[int, ...]]:
    """The rotary sections of every head size that turns, spelled out."""
    layers = parse_pattern(config.pattern, config.mixers).configs(config.mixers, path="mixers")
    return [rotary_sections(dim, config.rope_sections) for layer in layers for dim in sorted(layer.rotary_dims)]


def _compared() -> list[str]:
    return [field.name for field in dataclasses.fields(ModelConfig) if field.name not in _FREE_FIELDS]
