"""What the frames of sessions side by side take, when they are shown, and how that is kept in bounded space."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from side_cases import FRAMES, RATE, Gated, bars, session, shown
from streaming_cases import frames_of
from waiting import wait_until

from hybridvl.data.sources import open_source
from hybridvl.inference.streaming.history import History, Point
from hybridvl.inference.streaming.showing import Showing
from hybridvl.inference.streaming.sides import ShownSide, Side
from hybridvl.layers.errors import ConfigError


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bars(tmp_path_factory.mktemp("side"))


def test_sides_take_turns_in_coming_first(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes first shares the processor with the thread that makes the next frame ready."""
    order: list[str] = []
    show = ShownSide.show
    monkeypatch.setattr(ShownSide, "show", lambda self, *what: (order.append(self.side.name), show(self, *what)))
    with shown([Side(name=name, session=session()) for name in "ab"], open_source(video)) as both:
        wait_until(lambda: both.view.status == "ended")
    assert "".join(order) == ("abba" * FRAMES)[: 2 * FRAMES]


def test_a_file_that_plays_takes_its_time(video: Path) -> None:
    begin = time.monotonic()
    with shown([Side(name="ours", session=session())], open_source(video), showing=Showing(realtime=True)) as one:
        wait_until(lambda: one.view.status == "ended")
    assert time.monotonic() - begin >= (FRAMES - 1) / RATE


def test_a_pause_makes_a_file_that_plays_take_longer(video: Path) -> None:
    begin, pause = time.monotonic(), 1.0  # seconds
    with shown([Side(name="ours", session=session())], open_source(video), showing=Showing(realtime=True)) as one:
        wait_until(lambda: one.view.sides[0].frames >= 3)
        one.pause()
        time.sleep(pause)
        one.go_on()
        wait_until(lambda: one.view.status == "ended")
    assert one.view.sides[0].frames == FRAMES
    # The frame that was waited for may come at once when the stream goes on.
    assert time.monotonic() - begin >= (FRAMES - 2) / RATE + pause


class Clock:
    """Tells the time at the beginning and at the end of each frame, which takes so many milliseconds."""

    def __init__(self, took: Sequence[float]) -> None:
        self._readings = itertools.accumulate(seconds for one in took for seconds in (1.0, one / 1000))

    def perf_counter(self) -> float:
        return next(self._readings)


def test_times_are_those_of_the_last_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    took = [float(number**2) for number in range(30)]
    took[0] = 7.0
    source = Gated(np.stack(frames_of(0, len(took))))
    source.gate.release(len(took))
    monkeypatch.setattr("hybridvl.inference.streaming.sides.time", Clock(took))
    with shown([Side(name="ours", session=session())], source) as one:
        wait_until(lambda: one.view.status == "ended")
    (side,) = one.view.sides
    assert [point.milliseconds for point in side.points] == pytest.approx(took)
    assert side.milliseconds == pytest.approx((21**2 + 22**2) / 2)  # the median of the last sixteen, 14 to 29


@settings(max_examples=60, deadline=None)
@given(took=st.lists(st.floats(0.1, 1e3), min_size=1, max_size=300), half=st.integers(1, 8))
def test_a_history_is_bounded_and_its_points_are_means(took: list[float], half: int) -> None:
    history = History(2 * half)
    for number, milliseconds in enumerate(took):
        history.add(Point(time=number / 2, tokens=number, milliseconds=milliseconds, state_bytes=7 * number))
        assert len(history.points) <= 2 * half
    stride = history.stride
    parts = [took[begin : begin + stride] for begin in range(0, len(took), stride)]
    assert [point.milliseconds for point in history.points] == pytest.approx([np.mean(part) for part in parts])
    ends = [min(begin + stride, len(took)) - 1 for begin in range(0, len(took), stride)]
    assert [(point.time, point.tokens, point.state_bytes) for point in history.points] == [
        (end / 2, end, 7 * end) for end in ends
    ]


def test_history_wants_an_even_number() -> None:
    for most in (0, 3):
        with pytest.raises(ConfigError, match=f"most: {most}; expected"):
            History(most)
