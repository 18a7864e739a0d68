"""Patterns to mixer configurations: what overrides what, and where each mistake is said to be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch

from hybridvl.layers import MIXERS, ConfigError, Mixer, MixerConfig, register
from hybridvl.layers.full import FullAttentionConfig
from hybridvl.layers.gdn import GatedDeltaNetConfig
from hybridvl.layers.mamba2 import Mamba2Config
from hybridvl.layers.parallel import ParallelConfig
from hybridvl.layers.swa import SlidingWindowConfig
from hybridvl.pattern import PatternError, parse_pattern


@dataclass(frozen=True, kw_only=True)
class TypedConfig(MixerConfig):
    """A mixer that checks none of its types itself, with a field of every kind."""

    whole: int = 1
    number: float = 1.0
    flag: bool = False
    word: str = "x"
    maybe: int | None = None
    pair: tuple[float, float] = (0.0, 1.0)
    many: tuple[int, ...] = ()
    listed: list[int] | None = None
    choice: Literal["left", "right"] = "left"

    def __post_init__(self) -> None:
        if self.whole > 100:
            raise ConfigError("too large altogether")

    def build(self, width: int) -> Mixer:
        raise NotImplementedError

    def num_params(self, width: int) -> int:
        return 0

    def flops(self, width: int, tokens: int, context: int = 0) -> int:
        return 0

    def state_bytes(self, context: int, dtype: torch.dtype, width: int | None = None) -> int:
        return 0


@pytest.fixture(autouse=True)
def typed() -> Iterator[None]:
    register("typed")(TypedConfig)
    yield
    del MIXERS["typed"]


def test_defaults_and_overrides() -> None:
    mixers = {"wide": {"type": "swa", "window": 64, "heads": 4}, "gdn": {"heads": 8}}
    pattern = parse_pattern("wide wide(window=32) gdn gdn(expand_v=1) full mamba2+swa", mixers)
    assert pattern.configs(mixers) == [
        SlidingWindowConfig(window=64, heads=4),
        SlidingWindowConfig(window=32, heads=4),
        GatedDeltaNetConfig(heads=8),
        GatedDeltaNetConfig(heads=8, expand_v=1.0),
        FullAttentionConfig(),
        ParallelConfig(branches=(Mamba2Config(), SlidingWindowConfig())),
    ]


def test_named_mixers_come_before_registered_ones() -> None:
    mixers = {"swa": {"type": "gdn", "heads": 4}}
    assert parse_pattern("swa", mixers).configs(mixers) == [GatedDeltaNetConfig(heads=4)]


def test_a_type_is_an_import_path() -> None:
    mixers = {"mine": {"type": "hybridvl.layers.swa.SlidingWindowConfig", "window": 5}}
    assert parse_pattern("mine", mixers).configs(mixers) == [SlidingWindowConfig(window=5)]


def test_equal_layers_share_a_configuration() -> None:
    configs = parse_pattern("(swa gdn*3)*9").configs()
    assert len(configs) == 36
    assert len({id(config) for config in configs}) == 2


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("whole", "3", 3),
        ("number", "3", 3.0),
        ("number", "1e-3", 1e-3),
        ("flag", "true", True),
        ("word", "'3'", "3"),
        ("maybe", "null", None),
        ("maybe", "3", 3),
        ("pair", "[1, 2.5]", (1.0, 2.5)),
        ("many", "[1, 2, 3]", (1, 2, 3)),
        ("many", "[]", ()),
        ("choice", "right", "right"),
    ],
)
def test_values_of_every_type(key: str, written: str, value: Any) -> None:
    assert parse_pattern(f"typed({key}={written})").configs() == [TypedConfig(**{key: value})]
    plain = list(value) if isinstance(value, tuple) else value
    mixers = {"typed": {key: plain}}
    [config] = parse_pattern("typed", mixers).configs(mixers)
    assert config == TypedConfig(**{key: value})
    assert type(getattr(config, key)) is type(value)


@pytest.mark.parametrize(
    ("key", "value", "accepted"),
    [
        ("whole", 2.5, "an integer"),
        ("whole", True, "an integer"),
        ("whole", "4", "an integer"),
        ("whole", None, "an integer"),
        ("number", "fast", "a number"),
        ("number", False, "a number"),
        ("flag", 1, "true or false"),
        ("word", 3, "a string"),
        ("maybe", "none", "an integer or null"),
        ("pair", [1], "tuple[float, float]"),
        ("pair", 1, "tuple[float, float]"),
        ("many", [1, "b"], "tuple[int, ...]"),
        ("choice", "up", "one of left, right"),
    ],
)
def test_wrong_types_are_named_with_their_place(key: str, value: Any, accepted: str) -> None:
    mixers = {"mine": {"type": "typed", key: value}}
    with pytest.raises(ConfigError) as caught:
        parse_pattern("mine", mixers).configs(mixers, "model.net.mixers")
    shown = tuple(value) if isinstance(value, list) else value
    assert str(caught.value) == f"model.net.mixers.mine.{key} = {shown!r}: expected {accepted}"


@pytest.mark.parametrize(
    ("mixers", "message"),
    [
        ({"swa": {"window": 0}}, "mixers.swa.window = 0: expected an integer of at least 1"),
        ({"swa": {"window": -5}}, "mixers.swa.window = -5: expected an integer of at least 1"),
        ({"swa": {"heads": 3, "kv_heads": 2}}, "mixers.swa.kv_heads = 2: expected a divisor of heads = 3"),
        ({"swa": {"heads": 3}}, "mixers.swa: swa.kv_heads = 2: expected a divisor of heads = 3"),
        ({"typed": {"whole": 101}, "swa": {"type": "typed", "whole": 102}}, "mixers.swa: too large altogether"),
        ({"wide": {"type": "swo"}}, "mixers.wide.type: unknown mixer 'swo', did you mean 'swa'? (known: full, gdn, "),
        ({"wide": {"type": 3}}, "mixers.wide.type = 3: expected the name or import path of a mixer"),
        ({"wide": {"type": "no.such.Config"}}, "mixers.wide.type: mixer type 'no.such.Config' cannot be imported: "),
        ({"swaa": {"window": 3}}, "mixers.swaa: no type, and no mixer is registered as 'swaa', did you mean 'swa'?; "),
        ({"wide": {"type": "swa", "windo": 3}}, "mixers.wide.windo: unknown option, did you mean 'window'? (known: "),
        ({"swa": 3}, "mixers.swa: 3; expected a mapping of names to options"),
        ([], "mixers: []; expected a mapping of names to options"),
    ],
)
def test_mistakes_in_mixers(mixers: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_pattern("swa").configs(mixers)
    assert not isinstance(caught.value, PatternError)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "column", "problem"),
    [
        ("gdn swa(window=0)", 9, "swa.window = 0: expected an integer of at least 1"),
        ("gdn swa(heads=2, window=wide)", 18, "swa.window = 'wide': expected an integer"),
        ("swa(windo=3)", 5, "swa.windo: unknown option, did you mean 'window'? (known: "),
        ("gdn wide(heads=3)", 5, "swa.kv_heads = 2: expected a divisor of heads = 3"),
        ("gdn wide(heads=3)+gdn(gate=1)", 5, "swa.kv_heads = 2: expected a divisor of heads = 3"),
        ("full+gdn(gate=1)", 10, "gdn.gate = 1: expected true or false"),
        ("wide(window=[1])", 6, "wide.window = (1,): expected an integer"),
    ],
)
def test_mistakes_in_the_pattern_have_a_caret(text: str, column: int, problem: str) -> None:
    mixers = {"wide": {"type": "swa", "window": 64}}
    pattern = parse_pattern(text, mixers)
    with pytest.raises(PatternError) as caught:
        pattern.configs(mixers)
    assert caught.value.column == column
    assert caught.value.problem.startswith(problem)
    assert str(caught.value).endswith(f"\n  {text}\n  {' ' * (column - 1)}^")


def test_a_name_that_is_known_no_more() -> None:
    pattern = parse_pattern("gdn wide", {"wide": {"type": "swa"}})
    with pytest.raises(PatternError, match="column 5: unknown mixer 'wide'"):
        pattern.configs()
