"""Rates over written replies, counted by hand."""

from __future__ import annotations

import pytest

from hybridvl.training.scores import ReplyScores, digits_right


@pytest.mark.parametrize(
    ("reply", "target", "right"),
    [
        ("1 2 3", "1 2 3", (3, 3)),
        ("1 2", "1 2 3", (2, 3)),
        ("1 2 3 4", "1 2 3", (3, 3)),
        ("2 3", "1 2 3", (0, 3)),
        ("", "7", (0, 1)),
        ("seven", "seven", (0, 0)),
    ],
)
def test_digits_are_compared_place_by_place(reply: str, target: str, right: tuple[int, int]) -> None:
    assert digits_right(reply, target) == right


def test_rates() -> None:
    scores = ReplyScores()
    assert scores.add("line", "1 2 3", "1 2 3")
    assert not scores.add("line", "1 9 3", "1 2 3")
    assert scores.add("cell", " 4\n", "4")
    assert not scores.add("count", "2", "3")
    assert scores.metrics() == {
        "exact": 2 / 4,
        "line_exact": 1 / 2,
        "line_digit_accuracy": 5 / 6,
        "cell_exact": 1.0,
        "cell_digit_accuracy": 1.0,
        "count_exact": 0.0,
        "count_digit_accuracy": 0.0,
        "digit_accuracy": 6 / 7,  # what is read off the page; counting is not reading
    }


def test_replies_without_a_kind_count_overall() -> None:
    scores = ReplyScores()
    scores.add("", "red", "red")
    assert scores.metrics() == {"exact": 1.0}
