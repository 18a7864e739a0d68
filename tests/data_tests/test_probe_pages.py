"""Dense pages and page order: answers read back from the pictures that the model sees; sizes, distances, errors."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from probe_cases import (
    SPLITS,
    assert_follows_from_its_number,
    assert_uniform,
    bounds,
    digit_of,
    read_images,
    read_turns,
)

from hybridvl.data.probes.dense_pages import DensePages
from hybridvl.data.probes.page_order import PageOrder
from hybridvl.layers.errors import ConfigError

VISION = re.compile(r"<\|vision_start\|>((?:<\|image_pad\|>)+)<\|vision_end\|>")


def lines_of(picture: np.ndarray, split: Any) -> list[str]:
    """What stands on a page of 8-pixel cells, by line; a cell of nothing but paper has no digit."""
    cells = picture.reshape(picture.shape[0] // 8, 8, -1, 8).transpose(0, 2, 1, 3)
    return ["".join("" if (cell == 236).all() else str(digit_of(cell, split)) for cell in line) for line in cells]


@given(
    index=st.integers(0, 10**6),
    split=st.sampled_from(SPLITS),
    digits=st.tuples(st.integers(1, 40), st.integers(0, 9)),
    separator=st.sampled_from(["", " "]),
)
@settings(deadline=None, max_examples=30)
def test_dense_pages_answer_with_what_stands_on_them(index: int, split: Any, digits: Any, separator: str) -> None:
    task = DensePages((digits[0], sum(digits)), separator=separator, augment=0.0)
    (turn,) = read_turns(task, split, index)
    (picture,) = read_images(task, split, index)
    lines = lines_of(picture, split)
    assert turn.answer == "\n".join(separator.join(line) for line in lines)
    # One token a digit, and as many columns as lines or one more.
    assert VISION.sub("", turn.question) == "Read the page."
    shape = picture.shape[0] // 8, picture.shape[1] // 8
    assert turn.question.count("<|image_pad|>") == shape[0] * shape[1]
    assert 0 <= shape[1] - shape[0] <= 1
    count = len("".join(lines))
    assert digits[0] <= count <= sum(digits)
    assert all(len(line) == shape[1] for line in lines[:-1])
    low, high = bounds(turn.kind, "digits")
    assert low <= count <= high


@given(count=st.integers(1, 60), page=st.sampled_from([32, 64]), index=st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_a_page_of_one_size_has_smaller_digits(count: int, page: int, index: int) -> None:
    columns = math.ceil(math.sqrt(count))
    side = page // columns
    task = DensePages(count, page=page)
    (picture,) = read_images(task, "val", index)
    assert picture.shape == (page, page)
    assert (picture[side * math.ceil(count / columns) :] == 236).all()
    assert (picture[:, side * columns :] == 236).all()
    inked = [
        (picture[side * line : side * (line + 1), side * column : side * (column + 1)] < 200).any()
        for line in range(math.ceil(count / columns))
        for column in range(columns)
    ]
    assert inked == [True] * count + [False] * (len(inked) - count)
    if side == 8:
        (turn,) = read_turns(task, "val", index)
        read = [digit_of(picture[8 * (n // columns) :, 8 * (n % columns) :][:8, :8], "val") for n in range(count)]
        assert turn.answer.replace("\n", "") == "".join(map(str, read))


def test_every_number_of_digits_is_as_likely() -> None:
    for task, split in ((DensePages((3, 12)), "test"), (DensePages((3, 12), skew=0.0), "train")):
        source = task.source(split, 0)  # type: ignore[arg-type]
        assert_uniform([len(source.drawn(index)) for index in range(2000)], 3, 12)


@pytest.mark.parametrize("skew", [1.0, 2.0])
def test_training_shows_small_pages_more_often(skew: float) -> None:
    source = DensePages((1, 6), skew=skew).source("train", 0)
    counts = np.bincount([len(source.drawn(index)) for index in range(3000)], minlength=7)[1:]
    weights = 1 / np.arange(1, 7) ** skew
    expected = 3000 * weights / weights.sum()
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()


@given(
    index=st.integers(0, 10**6),
    split=st.sampled_from(SPLITS),
    pages=st.tuples(st.integers(2, 8), st.integers(0, 2)),
    digits=st.integers(1, 3),
)
@settings(deadline=None, max_examples=40)
def test_page_order_is_that_of_the_pages(index: int, split: Any, pages: Any, digits: int) -> None:
    task = PageOrder((pages[0], sum(pages)), digits, turns=5, eval_turns=3, augment=0.0)
    turns = read_turns(task, split, index)
    shown = [line for picture in read_images(task, split, index) for line in lines_of(picture, split)]
    assert len(set(shown)) == len(shown)
    assert {len(number) for number in shown} == {digits}
    assert pages[0] <= len(shown) <= sum(pages)
    assert VISION.match(turns[0].question)
    questions = [VISION.sub("", turn.question) for turn in turns]
    assert len(set(questions)) == len(questions) <= (5 if split == "train" else 3)
    for question, turn in zip(questions, turns, strict=True):
        numbers = re.findall(r"\d+", question)
        if "first page" in question:
            assert turn.answer == shown[0]
            name, distance = "first_lag", len(shown)
        elif question.startswith("On which page"):
            assert shown[int(turn.answer) - 1] == numbers[0]
            name, distance = "place_lag", len(shown) - shown.index(numbers[0])
        else:
            assert re.fullmatch(r"Which came first, \d+ or \d+\?", question)
            places = [shown.index(number) for number in numbers]
            assert turn.answer == shown[min(places)]
            name, distance = "order_apart", abs(places[0] - places[1])
        low, high = bounds(turn.kind, name)
        assert low <= distance <= high
        if pages[1]:
            low, high = bounds(turn.kind, "pages")
            assert low <= len(shown) <= high
        else:
            assert turn.kind.startswith(name)


def test_every_distance_of_a_question_is_as_likely() -> None:
    source = PageOrder(7).source("test", 0)
    asked = [source.drawn(index).asked[0] for index in range(4500)]
    by_kind = {kind: [one for one in asked if one[0] == kind] for kind in ("place", "order", "first")}
    assert_uniform([["place", "order", "first"].index(kind) for kind, _, _ in asked], 0, 2)
    assert_uniform([page for _, page, _ in by_kind["place"]], 0, 6)
    assert_uniform([abs(page - other) for _, page, other in by_kind["order"]], 1, 6)
    assert_uniform([int(page < other) for _, page, other in by_kind["order"]], 0, 1)


def test_kinds_are_asked_as_often_as_they_weigh() -> None:
    source = PageOrder(4, kinds={"order": 1, "first": 0, "place": 3}).source("test", 0)
    kinds = [source.drawn(index).asked[0][0] for index in range(1000)]
    assert set(kinds) == {"order", "place"}
    assert abs(kinds.count("place") - 750) < 70


def test_scans_of_a_digit_are_all_used() -> None:
    source = PageOrder(10).source("val", 0)
    used = {int(number) for index in range(600) for number in source.drawn(index).scans.reshape(-1)}
    assert len(used) == 200


def test_chances_are_those_of_guessing() -> None:
    chances = PageOrder(5, test_samples=60).chances()
    for name, chance in {"place": 1 / 5, "order": 1 / 2}.items():
        found = [chances[kind] for kind in chances if kind.startswith(name)]
        assert len(found) > 1
        assert found == pytest.approx([chance] * len(found))
    assert chances["first_lag_5_8"] == pytest.approx(0.1)
    assert 0.1 < chances[""] < 0.5
    assert DensePages(3, test_samples=2).chances() == pytest.approx({"": 0.001, "digits_3_4": 0.001})


@pytest.mark.parametrize("pages", [2, 4, 7])
def test_of_the_possible_answers_chance_is_one(pages: int) -> None:
    possible = {"place": [str(page + 1) for page in range(pages)], "first": list("0123456789")}
    for asked in PageOrder(pages, test_samples=300).questions():
        answers = possible.get(asked.kind.split("_")[0]) or re.findall(r"\d", asked.question)
        assert answers.count(asked.answer) == 1
        assert asked.chance == pytest.approx(1 / len(answers))


@pytest.mark.parametrize("pages", [4, (2, 6)])
def test_questions_give_nothing_away(pages: Any) -> None:
    """To one who has not seen the pages, and answers each question as it was answered most often in training."""
    task = PageOrder(pages, turns=1, train_samples=6000, test_samples=3000)
    known: dict[str, Counter[str]] = defaultdict(Counter)
    for asked in task.questions("train"):
        known[asked.question][asked.answer] += 1
    questions = task.questions()
    for name in ("place", "order", "first"):
        found = [asked for asked in questions if re.search(rf"(^|_){name}_", asked.kind)]
        right = sum(known[asked.question].most_common(1)[0][0] == asked.answer for asked in found)
        spread = math.sqrt(sum(asked.chance * (1 - asked.chance) for asked in found))
        assert len(found) > 900
        assert abs(right - sum(asked.chance for asked in found)) < 4 * spread


def test_the_last_page_alone_orders_as_many_pairs_as_the_docs_say() -> None:
    pages = 4
    exact = np.mean([(1 + 1 / (pages - apart)) / 2 for apart in range(1, pages)])
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    assert f"right in {exact:.2f} of these questions with {pages} pages" in page
    source = PageOrder(pages, kinds={"order": 1}).source("test", 0)
    pairs = [source.drawn(index).asked[0][1:] for index in range(2000)]
    # Who sees the last page names the other one, and guesses where it is not asked about.
    assert np.mean([1.0 if pages - 1 in pair else 0.5 for pair in pairs]) == pytest.approx(exact, abs=0.03)
    assert all(pages - 1 in pair for pair in pairs if abs(pair[0] - pair[1]) == pages - 1)


@pytest.mark.parametrize("task", [DensePages(), DensePages(page=32), PageOrder(), PageOrder((5, 90), digits=2)])
def test_samples_follow_from_seed_split_epoch_and_number(task: Any) -> None:
    assert_follows_from_its_number(task)


@pytest.mark.parametrize("probe", [DensePages, PageOrder])
def test_only_training_pages_are_distorted(probe: Any) -> None:
    def clean_paper(split: Any, augment: float) -> float:
        pictures = read_images(probe(augment=augment), split, 0)
        return float(np.mean([(picture == 236).mean() for picture in pictures]))

    assert clean_paper("train", 1.0) < 0.1
    assert min(clean_paper("train", 0.0), clean_paper("val", 1.0), clean_paper("test", 1.0)) > 0.3


@pytest.mark.parametrize(
    ("probe", "options", "message"),
    [
        (DensePages, {"digits": 0}, r"data\.task\.digits: 0; expected two numbers"),
        (DensePages, {"cell": 0}, r"data\.task\.cell: 0; expected at least 1"),
        (DensePages, {"digits": 50, "page": 31}, r"data\.task\.page: 31 pixels; expected at least 32, 4 for each of 8"),
        (DensePages, {"augment": 3.0}, r"data\.task\.augment: 3\.0; expected a number from 0 to 2"),
        (DensePages, {"skew": -1.0}, r"data\.task\.skew: -1\.0; expected a number from 0 to 10"),
        (DensePages, {"test_samples": 0}, r"data\.task\.test_samples: 0"),
        (PageOrder, {"pages": 1}, r"data\.task\.pages: 1; expected at least 2"),
        (PageOrder, {"pages": (1, 5)}, r"data\.task\.pages: \[1, 5\]; expected at least 2"),
        (PageOrder, {"pages": 11}, r"data\.task\.pages: 11; expected two numbers, 1 <= fewest <= most <= 10$"),
        (PageOrder, {"digits": 5}, r"data\.task\.digits: 5; expected at most 4"),
        (PageOrder, {"kinds": {"last": 1}}, r"data\.task\.kinds: last; known are place, order, first"),
        (PageOrder, {"turns": 0}, r"data\.task\.turns: 0"),
        (PageOrder, {"augment": -1.0}, r"data\.task\.augment: -1\.0"),
    ],
)
def test_bad_settings_are_named(probe: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        probe(**options)
