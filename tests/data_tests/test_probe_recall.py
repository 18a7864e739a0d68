"""Recall of keys: answers, lags, loads and noise read back from what the model reads; gaps, errors."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from probe_cases import SPLITS, assert_follows_from_its_number, assert_uniform, bounds, read_turns, tokens_in

from hybridvl.data.probes.associative_recall import AssociativeRecall
from hybridvl.data.probes.in_context import InContextRecall, NoisyRecall
from hybridvl.data.probes.symbols import ASK, LETTERS, SIGNS
from hybridvl.layers.errors import ConfigError

SIGN = f"[{re.escape(SIGNS)}]"


def test_symbols_are_one_token_each_wherever_they_stand() -> None:
    rng = np.random.default_rng(0)
    symbols = np.array(list(LETTERS + SIGNS + ASK + "." + "0123456789"))
    assert len(set(symbols.tolist())) == 26 + len(SIGNS) + 12
    # A turn's text follows its role and a line break.
    for text in ["user\n" + "".join(rng.choice(symbols, 40)) for _ in range(200)] + [
        "user\n" + first + second for first in symbols for second in symbols
    ]:
        assert len(tokens_in(text)) == 2 + len(text) - len("user\n")


@given(
    index=st.integers(0, 10**6),
    split=st.sampled_from(SPLITS),
    pairs=st.tuples(st.integers(1, 9), st.integers(0, 9)),
    spare=st.one_of(st.none(), st.tuples(st.integers(0, 9), st.integers(0, 9))),
    queries=st.one_of(st.none(), st.integers(1, 5)),
    power=st.sampled_from([0.01, 0.5, 1.0]),
    letters=st.integers(1, 2),
    digits=st.integers(1, 2),
)
@settings(deadline=None, max_examples=40)
def test_associative_recall_answers_with_the_value_of_the_key(
    index: int, split: Any, pairs: Any, spare: Any, queries: Any, power: float, letters: int, digits: int
) -> None:
    span = (pairs[0], sum(pairs))
    most = 2 * span[1]
    length = None if spare is None else (most + spare[0], most + sum(spare))
    task = AssociativeRecall(span, length, queries, power, letters, digits)
    turns = read_turns(task, split, index)
    shown = re.match(rf"(?:[A-Z]{{{letters}}}[0-9]{{{digits}}})+", turns[0].question)
    assert shown
    found = re.findall(r"([A-Z]+)([0-9]+)", shown[0])
    values = dict(found)
    assert span[0] <= len(found) == len(values) <= span[1]
    assert len(turns) == min(queries or len(found), len(found))
    slots = len(found)
    asked = []
    for turn in turns:
        text = turn.question.removeprefix(shown[0]) if turn is turns[0] else turn.question
        parts = re.fullmatch(rf"((?:{SIGN}{SIGN})*)\?([A-Z]+)", text)
        assert parts, text
        slots += len(parts[1]) // 2
        assert turn.answer == values[parts[2]]
        low, high = bounds(turn.kind, "lag")
        assert low <= slots - list(values).index(parts[2]) <= high
        if span[0] < span[1]:
            low, high = bounds(turn.kind, "pairs")
            assert low <= len(found) <= high
        else:
            assert turn.kind.startswith("lag_")
        asked.append(parts[2])
        slots += 1
    assert len(set(asked)) == len(asked)
    assert slots <= (length or (0, most))[1]


def test_gaps_follow_the_power_law() -> None:
    def gaps(power: float) -> list[int]:
        source = AssociativeRecall(4, 24, queries=1, power=power).source("train", 0)
        return [int(source.drawn(index).gaps[0]) for index in range(4000)]

    assert_uniform(gaps(1.0), 0, 19)
    counts = np.bincount(gaps(0.01), minlength=20)
    weights = 1 / np.arange(1, 21) ** 0.99
    expected = 4000 * weights / weights.sum()
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()
    assert counts[0] > 10 * counts[19]


def test_without_a_length_queries_follow_the_pairs_at_once() -> None:
    for turn in read_turns(AssociativeRecall(5, length=None, letters=2), "val", 3)[1:]:
        assert re.fullmatch(r"\?[A-Z]{2}", turn.question)


@given(
    index=st.integers(0, 10**6),
    split=st.sampled_from(SPLITS),
    keys=st.tuples(st.integers(1, 9), st.integers(0, 9)),
    length=st.tuples(st.integers(1, 30), st.integers(0, 9)),
    queries=st.integers(1, 5),
    letters=st.integers(1, 2),
    digits=st.integers(1, 2),
    noise=st.sampled_from([None, 0.0, 0.4, 1.0]),
)
@settings(deadline=None, max_examples=40)
def test_in_context_recall_answers_with_what_the_key_was_last_shown_with(
    index: int, split: Any, keys: Any, length: Any, queries: int, letters: int, digits: int, noise: Any
) -> None:
    options = (keys[0], sum(keys)), (length[0], sum(length)), queries, letters, digits
    task = InContextRecall(*options) if noise is None else NoisyRecall(noise, *options)
    turns = read_turns(task, split, index)
    stream, _, first = turns[0].question.partition(ASK)
    slots = re.findall(rf"([A-Z]{{{letters}}})([0-9]{{{digits}}})|({SIGN}{SIGN})", stream)
    assert "".join("".join(slot) for slot in slots) == stream
    assert length[0] <= len(slots) <= sum(length)
    last = {key: number for number, (key, _, _) in enumerate(slots) if key}
    values = {key: value for key, value, _ in slots if key}
    assert {(key, value) for key, value, _ in slots if key} == set(values.items())  # a key has one value
    assert 1 <= len(values) <= sum(keys)
    if noise in (None, 0.0):
        assert not re.search(SIGN, stream)
    if noise == 1.0:
        assert len(last) == 1
    assert len(turns) == min(queries, len(values))
    asked = [first, *(turn.question.removeprefix(ASK) for turn in turns[1:])]
    assert len(set(asked)) == len(asked)
    for key, turn in zip(asked, turns, strict=True):
        assert turn.answer == values[key]
        low, high = bounds(turn.kind, "lag")
        assert low <= len(slots) - last[key] <= high
        if keys[1]:
            low, high = bounds(turn.kind, "keys")
            assert low <= sum(keys)
            assert high >= len(values)


def test_noise_is_as_frequent_as_asked_for() -> None:
    source = NoisyRecall(noise=0.3, length=40).source("train", 0)
    noisy = sum(int((source.drawn(index).slots < 0).sum()) for index in range(300))
    # One slot of forty is never noise.
    expected = 300 * 39 * 0.3
    assert abs(noisy - expected) < 5 * np.sqrt(expected * 0.7)


@pytest.mark.parametrize("task", [AssociativeRecall(), InContextRecall(), NoisyRecall()])
def test_streams_follow_from_seed_split_epoch_and_number(task: Any) -> None:
    assert_follows_from_its_number(task)


@pytest.mark.parametrize("probe", [AssociativeRecall, InContextRecall, NoisyRecall])
def test_guessing_is_right_once_in_as_often_as_there_are_values(probe: Any) -> None:
    chances = probe(digits=2, test_samples=40).chances()
    assert {name for name in chances if name} == {kind for kind in chances if kind.startswith("lag_")}
    assert list(chances.values()) == pytest.approx([0.01] * len(chances))
    answers = [turn.answer for index in range(200) for turn in read_turns(probe(), "test", index)]
    counts = np.bincount([int(answer) for answer in answers], minlength=10)
    expected = len(answers) / 10
    assert (np.abs(counts - expected) < 6 * np.sqrt(expected)).all()


@pytest.mark.parametrize(
    ("probe", "options", "message"),
    [
        (AssociativeRecall, {"pairs": 0}, r"data\.task\.pairs: 0; expected two numbers"),
        (AssociativeRecall, {"pairs": 27, "length": None}, r"letters: 1, which give 26 labels; .* for 27 pairs"),
        (AssociativeRecall, {"length": 15}, r"data\.task\.length: 15; expected at least 16 slots, for 8 pairs and 8"),
        (AssociativeRecall, {"length": (9, 30), "queries": 2}, r"data\.task\.length: \[9, 30\]; expected at least 10"),
        (AssociativeRecall, {"queries": 0}, r"data\.task\.queries: 0; expected at least 1"),
        (AssociativeRecall, {"power": -1.0}, r"data\.task\.power: -1\.0; expected a number from 0 to 10"),
        (AssociativeRecall, {"digits": 0}, r"data\.task\.digits: 0"),
        (AssociativeRecall, {"val_samples": 0}, r"data\.task\.val_samples: 0"),
        (InContextRecall, {"keys": (3, 30)}, r"letters: 1, which give 26 labels; expected enough for 30 keys"),
        (InContextRecall, {"length": 0}, r"data\.task\.length: 0"),
        (InContextRecall, {"queries": 0}, r"data\.task\.queries: 0"),
        (NoisyRecall, {"noise": 1.5}, r"data\.task\.noise: 1\.5; expected a number from 0 to 1"),
        (NoisyRecall, {"letters": 0}, r"data\.task\.letters: 0"),
    ],
)
def test_bad_settings_are_named(probe: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        probe(**options)
