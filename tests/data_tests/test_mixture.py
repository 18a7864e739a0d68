"""Tests of hybridvl.data.mixture: proportions, no sample twice before all of its part, parts named in messages."""

from collections import Counter

import pytest
from data_cases import small_module
from hypothesis import given
from hypothesis import strategies as st

from hybridvl.data.digits import DigitPages
from hybridvl.data.mixture import Mixture, Part, scattered, shares
from hybridvl.data.task import Source, StreamSource, Task
from hybridvl.layers import ConfigError


class Numbers(Task):
    """Samples that say which one they are."""

    def __init__(self, name, size):
        self.name, self.size = name, size

    def source(self, split, seed):
        return NumberSource(self.name, self.size if split == "train" else 2)


class NumberSource(Source):
    def __init__(self, name, size):
        self.name, self.size = name, size

    def __len__(self):
        return self.size

    def sample(self, index, epoch):
        assert 0 <= index < self.size
        answer = {"role": "assistant", "content": f"{self.name} {index} {epoch}"}
        return {"messages": [{"role": "user", "content": "Which?"}, answer, {"role": "user", "content": "?"}, answer]}


def taken(source, epoch, count=None):
    """(part, number, round) of the samples of an epoch, in order."""
    found = []
    for index in range(len(source) if count is None else count):
        name, number, round = source.sample(index, epoch)["messages"][1]["content"].split()
        found.append((name, int(number), int(round)))
    return found


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.1, 10), min_size=4, max_size=4),
    samples=st.integers(4, 60),
    seed=st.integers(0, 2**63),
)
def test_epochs_have_the_shares_and_no_sample_comes_twice_before_all_have(sizes, weights, samples, seed):
    parts = {f"p{n}": Part(Numbers(f"p{n}", size), weights[n]) for n, size in enumerate(sizes)}
    source = Mixture(parts, samples).source("train", seed)
    assert len(source) == samples
    expected = shares({name: part.weight for name, part in parts.items()}, samples)
    everything = []
    for epoch in range(3):
        found = taken(source, epoch)
        assert Counter(name for name, _, _ in found) == expected
        everything += found
    assert taken(source, 1) == taken(source, 1)
    for n, size in enumerate(sizes):
        counts = Counter(number for name, number, _ in everything if name == f"p{n}")
        rounds = {round for name, _, round in everything if name == f"p{n}"}
        assert max(counts.values()) - min([counts[number] for number in range(size)]) <= 1
        assert rounds == set(range(-(-sum(counts.values()) // size)))
        # In one round of a part each of its samples comes at most once.
        assert max(Counter(entry for entry in everything if entry[0] == f"p{n}").values()) == 1


@given(
    weights=st.dictionaries(st.text(max_size=3), st.floats(1e-3, 1e3), min_size=1, max_size=6), extra=st.integers(0, 99)
)
def test_shares_add_up_and_are_within_one_of_exact(weights, extra):
    total = len(weights) + extra
    counts = shares(weights, total)
    assert sum(counts.values()) == total
    raised = [name for name in weights if total * weights[name] / sum(weights.values()) < 1]
    for name, count in counts.items():
        exact = total * weights[name] / sum(weights.values())
        assert count >= 1
        assert count == 1 if name in raised else count <= exact + 1
        if not raised:
            assert abs(count - exact) < 1


def test_shares_of_the_papers_second_stage():
    mixture = {
        "text": 35.4,
        "caption": 16.4,
        "chart": 11.9,
        "vqa": 11.9,
        "ocr": 11.6,
        "maths": 10.5,
        "code": 1.56,
        "science": 0.78,
    }
    assert shares(mixture, 100_040) == {name: round(1000 * weight) for name, weight in mixture.items()}


@given(size=st.integers(1, 500), seed=st.integers(0, 2**63))
def test_scattered_is_an_order_of_all_whose_beginnings_are_spread(size, seed):
    order = [scattered(position, size, seed) for position in range(size)]
    assert sorted(order) == list(range(size))


def test_the_first_samples_are_a_mixture_too():
    parts = {"big": Part(Numbers("big", 5000), 3.0), "small": Part(Numbers("small", 5000), 1.0)}
    found = Counter(name for name, _, _ in taken(Mixture(parts, 4000).source("train", 0), 0, count=200))
    assert abs(found["big"] - 150) <= 5


def test_validation_takes_all_samples_and_names_the_parts():
    source = Mixture({"a": Part(Numbers("x", 9)), "b": Part(Numbers("y", 9), 5.0)}, 4).source("val", 0)
    assert taken(source, 0) == [("x", 0, 0), ("x", 1, 0), ("y", 0, 0), ("y", 1, 0)]
    assert [source.sample(index, 0)["kinds"] for index in (1, 2)] == [["a", "a"], ["b", "b"]]
    assert source.place(3) == "part b, sample 1"


def test_batches_of_two_tasks():
    pages = {"rows": (1, 1), "columns": (1, 2), "turns": 1, "train_pages": 8, "val_pages": 2, "test_pages": 2}
    parts = {
        "lines": Part(DigitPages(kinds={"line": 1}, **pages)),
        "cells": Part(DigitPages(kinds={"cell": 1}, **pages), 3),
    }
    module = small_module(task=Mixture(parts, 8), batch_size=8)
    kinds = [kind for batch in [next(iter(module.train_dataloader()))] for kind in batch["answer_kinds"]]
    assert Counter(kinds) == {"line": 2, "cell": 6}
    assert [kind for batch in module.val_dataloader() for kind in batch["answer_kinds"]] == ["line"] * 2 + ["cell"] * 2


class Streamed(Task):
    def source(self, split, seed):
        return type("Empty", (StreamSource,), dict.fromkeys(("rows", "state_dict", "decode")))()


class Broken(Task):
    def source(self, split, seed):
        raise ConfigError("data.task.path: gone")


@pytest.mark.parametrize(
    ("parts", "samples", "message"),
    [
        ({}, 1, r"data\.task\.parts: none; expected at least one"),
        ({"a": Part(Numbers("a", 1), 0.0)}, 1, r"data\.task\.parts\.a\.weight: 0\.0; expected a finite number above 0"),
        (
            {"a": Part(Numbers("a", 1)), "b": Part(Numbers("b", 1))},
            1,
            r"data\.task\.samples: 1; expected at least one for",
        ),
        ({"a": Part(Streamed())}, 1, r"part a: data\.task\.streaming: true; expected false"),
        ({"a": Part(Numbers("a", 0))}, 1, r"part a: no samples; expected at least one"),
        ({"a": Part(Broken())}, 1, r"part a: data\.task\.path: gone"),
    ],
)
def test_mistakes_name_the_part(parts, samples, message):
    with pytest.raises(ConfigError, match=message):
        Mixture(parts, samples).source("train", 0)
