"""Selective copying and compression: what is to be written stands in the stream, in order; lags, loads, errors."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from probe_cases import SPLITS, assert_follows_from_its_number, assert_uniform, bounds, read_turns

from hybridvl.data.probes.copying import BLANK, Compression, SelectiveCopying
from hybridvl.data.probes.symbols import ASK, LETTERS
from hybridvl.layers.errors import ConfigError


@given(
    index=st.integers(0, 10**6),
    split=st.sampled_from(SPLITS),
    symbols=st.tuples(st.integers(1, 9), st.integers(0, 9)),
    length=st.tuples(st.integers(0, 40), st.integers(0, 9)),
    alphabet=st.integers(2, 26),
)
@settings(deadline=None, max_examples=40)
def test_selective_copying_answers_with_what_is_not_blank(
    index: int, split: Any, symbols: Any, length: Any, alphabet: int
) -> None:
    span = (symbols[0], sum(symbols))
    lengths = (span[1] + length[0], span[1] + sum(length))
    (turn,) = read_turns(SelectiveCopying(span, lengths, alphabet), split, index)
    assert turn.question.endswith(ASK)
    stream = turn.question.removesuffix(ASK)
    assert lengths[0] <= len(stream) <= lengths[1]
    assert turn.answer == stream.replace(BLANK, "")
    assert set(turn.answer) <= set(LETTERS[:alphabet])
    assert span[0] <= len(turn.answer) <= span[1]
    low, high = bounds(turn.kind, "lag")
    assert low <= len(stream.lstrip(BLANK)) <= high
    if symbols[1]:
        low, high = bounds(turn.kind, "symbols")
        assert low <= len(turn.answer) <= high
    else:
        assert turn.kind.startswith("lag_")


@given(
    index=st.integers(0, 10**6),
    split=st.sampled_from(SPLITS),
    symbols=st.tuples(st.integers(1, 30), st.integers(0, 9)),
    alphabet=st.integers(2, 26),
)
@settings(deadline=None, max_examples=25)
def test_compression_answers_with_all_of_the_stream(index: int, split: Any, symbols: Any, alphabet: int) -> None:
    (turn,) = read_turns(Compression((symbols[0], sum(symbols)), alphabet), split, index)
    assert turn.question == turn.answer + ASK
    assert set(turn.answer) <= set(LETTERS[:alphabet])
    assert symbols[0] <= len(turn.answer) <= sum(symbols)
    low, high = bounds(turn.kind, "symbols")
    assert low <= len(turn.answer) <= high


def test_every_lag_and_number_of_symbols_is_as_likely() -> None:
    source = SelectiveCopying((1, 4), 16).source("train", 0)
    drawn = [source.drawn(index) for index in range(4000)]
    assert_uniform([len(one.text) for one in drawn], 1, 4)
    for count in (1, 4):
        lags = [one.length - int(one.places[0]) for one in drawn if len(one.text) == count]
        assert_uniform(lags, count, 16)
    source = Compression((3, 12)).source("test", 1)
    assert_uniform([len(source.drawn(index).text) for index in range(2000)], 3, 12)


@pytest.mark.parametrize("task", [SelectiveCopying(), Compression()])
def test_streams_follow_from_seed_split_epoch_and_number(task: Any) -> None:
    assert_follows_from_its_number(task)


def test_chances_are_those_of_guessing_every_letter() -> None:
    chances = Compression((2, 4), alphabet=4, test_samples=30).chances()
    assert set(chances) == {"", "symbols_2", "symbols_3_4"}
    assert chances["symbols_2"] == 1 / 16
    assert 1 / 256 < chances["symbols_3_4"] < 1 / 64
    assert chances["symbols_3_4"] < chances[""] < chances["symbols_2"]
    assert SelectiveCopying(3, alphabet=5, test_samples=3).chances()[""] == pytest.approx(1 / 125)


@pytest.mark.parametrize(
    ("probe", "options", "message"),
    [
        (SelectiveCopying, {"symbols": 0}, r"data\.task\.symbols: 0; expected two numbers"),
        (SelectiveCopying, {"symbols": (2, 65)}, r"data\.task\.length: 64; expected at least the most symbols, 65"),
        (SelectiveCopying, {"length": (3, 9)}, r"data\.task\.length: \[3, 9\]; expected at least the most symbols, 4"),
        (SelectiveCopying, {"alphabet": 1}, r"data\.task\.alphabet: 1; expected a number from 2 to 26"),
        (SelectiveCopying, {"train_samples": 0}, r"data\.task\.train_samples: 0"),
        (Compression, {"symbols": (9, 3)}, r"data\.task\.symbols: \[9, 3\]"),
        (Compression, {"alphabet": 27}, r"data\.task\.alphabet: 27; expected a number from 2 to 26"),
    ],
)
def test_bad_settings_are_named(probe: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        probe(**options)
