"""Visual needle: the one frame that stands out is the one asked for; lags, lengths, errors."""

from __future__ import annotations

import re
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

from hybridvl.data.probes.visual_needle import VisualNeedle
from hybridvl.layers.errors import ConfigError

FRAME = r"<\|vision_start\|><\|image_pad\|><\|vision_end\|>"


@given(
    index=st.integers(0, 10**6),
    split=st.sampled_from(SPLITS),
    frames=st.tuples(st.integers(1, 30), st.integers(0, 30)),
    needle=st.sampled_from(["odd", "labelled"]),
)
@settings(deadline=None, max_examples=40)
def test_the_answer_is_the_digit_that_stands_out(index: int, split: Any, frames: Any, needle: Any) -> None:
    task = VisualNeedle((frames[0], sum(frames)), needle, augment=0.0)
    (turn,) = read_turns(task, split, index)
    shown = read_images(task, split, index)
    assert frames[0] <= len(shown) <= sum(frames)
    assert {picture.shape for picture in shown} == {(8, 8)}
    # Paper is light in all frames but the odd one.
    dark = [place for place, picture in enumerate(shown) if np.median(picture[[0, -1]]) < 130]
    if needle == "odd":
        assert re.fullmatch(rf"(?:{FRAME})+Which digit was white\?", turn.question)
        (place,) = dark
        picture = 260 - shown[place]
    else:
        before = re.fullmatch(rf"((?:{FRAME})*)\*(?:{FRAME})+Which digit was marked\?", turn.question)
        assert before
        assert dark == []
        place = before[1].count("<|image_pad|>")
        picture = shown[place]
    assert turn.answer == str(digit_of(picture, split))
    assert all(digit_of(picture, split) in range(10) for number, picture in enumerate(shown) if number != place)
    low, high = bounds(turn.kind, "lag")
    assert low <= len(shown) - place <= high
    if frames[1]:
        low, high = bounds(turn.kind, "frames")
        assert low <= len(shown) <= high
    else:
        assert turn.kind.startswith("lag_")


@pytest.mark.parametrize(("lag", "first", "last"), [(None, 1, 16), ((5, 8), 5, 8), ((10, 40), 10, 16)])
def test_every_lag_is_as_likely(lag: Any, first: int, last: int) -> None:
    source = VisualNeedle(16, lag=lag).source("test", 0)
    drawn = [source.drawn(index) for index in range(2000)]
    assert_uniform([len(one.scans) - one.needle for one in drawn], first, last)


@pytest.mark.parametrize("needle", ["odd", "labelled"])
def test_streams_follow_from_seed_split_epoch_and_number(needle: Any) -> None:
    assert_follows_from_its_number(VisualNeedle((10, 20), needle))


def test_only_training_frames_are_distorted() -> None:
    def clean_paper(split: Any, augment: float) -> float:
        return float(np.mean([(one == 236).mean() for one in read_images(VisualNeedle(augment=augment), split, 0)]))

    assert clean_paper("train", 1.0) < 0.1
    assert min(clean_paper("train", 0.0), clean_paper("val", 1.0), clean_paper("test", 1.0)) > 0.3


def test_guessing_is_right_one_time_in_ten() -> None:
    chances = VisualNeedle((3, 9), test_samples=50).chances()
    assert list(chances.values()) == pytest.approx([0.1] * len(chances))
    assert {bounds(kind, "frames") for kind in chances if kind} <= {(3, 4), (5, 8), (9, 16)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": (5, 3)}, r"data\.task\.frames: \[5, 3\]"),
        ({"needle": "big"}, r"data\.task\.needle: 'big'; expected one of odd, labelled"),
        ({"lag": (17, 20)}, r"data\.task\.lag: \[17, 20\]; expected a smallest lag of at most the fewest frames, 16"),
        ({"lag": (0, 3)}, r"data\.task\.lag: \[0, 3\]"),
        ({"size": 0}, r"data\.task\.size: 0"),
        ({"augment": 2.5}, r"data\.task\.augment: 2\.5"),
        ({"val_samples": 0}, r"data\.task\.val_samples: 0"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VisualNeedle(**options)
