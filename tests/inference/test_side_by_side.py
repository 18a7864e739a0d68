"""A source shown to sessions side by side: each is what a session alone is, measured in bounded space, and asked."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming_cases import equal_states, stream_model, stream_processor
from video_cases import decode_all, write_video

from hybridvl.data.sources import FrameSource, open_source
from hybridvl.data.sources.frames import Moment
from hybridvl.data.sources.interrupts import Interrupt
from hybridvl.data.sources.live import LiveConfig
from hybridvl.inference.streaming import StreamingSession
from hybridvl.inference.streaming.history import History, Point
from hybridvl.inference.streaming.showing import Showing
from hybridvl.inference.streaming.side_by_side import SideBySide
from hybridvl.inference.streaming.sides import ShownSide, Side
from hybridvl.layers.errors import ConfigError

FRAMES = 14


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("side") / "bars.mp4", frames=FRAMES, rate=4)


class Gated(FrameSource):
    """Frames of a video that come one at a time, when they are let through."""

    def __init__(self, pixels: np.ndarray, fails: bool = False) -> None:
        super().__init__("gated", None)
        self._pixels, self._fails = pixels, fails
        self.gate = threading.Semaphore(0)

    def _moments(self) -> Iterator[Moment]:
        for number in range(len(self._pixels)):
            while not self.gate.acquire(timeout=0.05):
                if self._closed.is_set():
                    return
            yield number / 4, lambda number=number: self._pixels[number]
        if self._fails:
            raise ConfigError("gated: the cable is out")

    def _release(self) -> None:
        pass


def session(pattern: str = "swa gdn") -> StreamingSession:
    return StreamingSession(stream_model(pattern), stream_processor())


def alone(frames: list[tuple[np.ndarray, float]], pattern: str = "swa gdn") -> StreamingSession:
    made = session(pattern)
    for pixels, moment in frames:
        made.push(pixels, moment)
    return made


def reply(one: StreamingSession, question: str, most: int) -> str:
    return "".join(piece.text for piece in one.ask(question, most))


def refused(interrupt: Interrupt) -> FrameSource:
    raise ConfigError("SOURCE: it is gone")


@contextmanager
def shown(
    sides: list[Side], source: FrameSource, opening: Callable[[Interrupt], FrameSource] = refused, **more: Any
) -> Iterator[SideBySide]:
    made = SideBySide(sides, source, opening, **more)
    made.start()
    try:
        yield made
    finally:
        made.close()


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_each_side_is_what_a_session_alone_is(video: Path) -> None:
    sides = [Side(name="ours", session=session()), Side(name="full", session=session("full*2"), answers=False)]
    with shown(sides, open_source(video)) as both:
        wait_until(lambda: both.view.status == "ended")
        view = both.view
    frames = [(pixels, number / 4) for number, pixels in enumerate(decode_all(video))]
    assert equal_states(sides[0].session, alone(frames))
    assert equal_states(sides[1].session, alone(frames, "full*2"))
    assert (view.time, view.error, view.dropped) == (frames[-1][1], "", 0)
    assert np.array_equal(view.picture, frames[-1][0])
    assert view.resident > 2**20
    for side, found in zip(sides, view.sides, strict=True):
        assert (found.name, found.frames, found.tokens) == (side.name, FRAMES, side.session.timeline.tokens)
        assert found.state_bytes == side.session.state_bytes
        assert [point.time for point in found.points] == [moment for _, moment in frames]
        assert all(point.milliseconds > 0 for point in found.points)
        assert found.milliseconds == pytest.approx(np.median([point.milliseconds for point in found.points]))
    ours, full = ([point.state_bytes for point in found.points] for found in view.sides)
    # Keys and values of two layers with two heads of 16 numbers each, in blocks of 64 tokens.
    blocks = [-(-point.tokens // 64) for point in view.sides[1].points]
    assert blocks[0] < blocks[-1]
    assert [size - full[0] for size in full] == [(n - blocks[0]) * 64 * 2 * 2 * 2 * 16 * 4 for n in blocks]
    assert len(set(ours)) == 1


def test_questions_leave_no_trace_and_are_answered_as_by_a_session(video: Path) -> None:
    pixels = decode_all(video)
    source = Gated(pixels)
    sides = [Side(name="ours", session=session()), Side(name="full", session=session("full*2"))]
    with shown(sides, source, showing=Showing(max_new_tokens=6)) as both:
        assert [answer.time for answer in both.ask("Anything?")][:1] == [None]
        source.gate.release(3)
        wait_until(lambda: both.view.sides[1].frames == 3)
        answers = both.ask("What is that?")
        first = next(answers)
        source.gate.release(FRAMES)  # the stream goes on while the reply is written
        wait_until(lambda: both.view.status == "ended")
        found = [first, *answers]
    frames = [(frame, number / 4) for number, frame in enumerate(pixels)]
    for number, pattern in enumerate(("swa gdn", "full*2")):
        text = "".join(answer.piece.text for answer in found if answer.side == number)
        assert text == reply(alone(frames[:3], pattern), "What is that?", 6)
        assert equal_states(sides[number].session, alone(frames, pattern))
    assert {answer.time for answer in found} == {0.5}
    # What was shown while the reply was written shared the processor with it.
    assert [len(side.points) for side in both.view.sides] == [3, 3]


def test_a_side_stops_at_its_most_tokens(video: Path) -> None:
    sides = [
        Side(name="ours", session=session()),
        Side(name="full", session=session("full*2"), answers=False, most_tokens=60),
    ]
    with shown(sides, open_source(video)) as both:
        wait_until(lambda: both.view.status == "ended")
    ours, full = both.view.sides
    assert (ours.stopped, full.stopped) == (False, True)
    assert ours.frames == FRAMES
    frames = [(pixels, number / 4) for number, pixels in enumerate(decode_all(video))]
    wanted = [alone(frames[: count + 1], "full*2").timeline.tokens for count in range(FRAMES)]
    assert full.frames == next(count for count, tokens in enumerate(wanted, 1) if tokens >= 60) < FRAMES
    assert full.tokens == wanted[full.frames - 1]
    assert len(full.points) == full.frames


def test_a_loop_goes_on_in_time(video: Path) -> None:
    side = Side(name="ours", session=session())
    with shown([side], open_source(video), lambda interrupt: open_source(video), loop=True) as one:
        wait_until(lambda: one.view.sides[0].frames > FRAMES)
        one.pause()
        assert one.view.status == "paused"
        count = one.view.sides[0].frames
        rate = 1.0  # the processor's frames a second: the time from one round to the next
        times = [number % FRAMES / 4 + number // FRAMES * ((FRAMES - 1) / 4 + rate) for number in range(count)]
        assert one.view.time == pytest.approx(times[-1])
        pixels = decode_all(video)
        assert equal_states(side.session, alone([(pixels[n % FRAMES], times[n]) for n in range(count)]))


def test_pause_go_on_and_begin_anew(video: Path) -> None:
    pixels = decode_all(video)
    sources = [Gated(pixels), Gated(pixels)]
    opened = iter(sources[1:])
    side = Side(name="ours", session=session())
    with shown([side], sources[0], lambda interrupt: next(opened)) as one:
        sources[0].gate.release(2)
        wait_until(lambda: one.view.sides[0].frames == 2)
        one.pause()
        assert one.view.status == "paused"
        sources[0].gate.release(1)
        time.sleep(0.2)
        assert one.view.sides[0].frames == 2
        one.go_on()
        wait_until(lambda: one.view.sides[0].frames == 3)
        assert one.view.status == "playing"
        one.begin_anew()
        wait_until(lambda: one.view.status == "waiting")
        assert (one.view.sides[0].frames, one.view.sides[0].points, one.view.picture) == (0, (), None)
        sources[1].gate.release(1)
        wait_until(lambda: one.view.sides[0].frames == 1)
        assert equal_states(side.session, alone([(pixels[0], 0.0)]))


def test_a_lost_source_ends_the_stream_and_may_be_opened_again(video: Path) -> None:
    pixels = decode_all(video)[:2]
    source = Gated(pixels, fails=True)
    openings = itertools.chain([refused], itertools.repeat(lambda interrupt: open_source(video)))
    side = Side(name="ours", session=session())
    with shown([side], source, lambda interrupt: next(openings)(interrupt), loop=True) as one:
        source.gate.release(9)
        wait_until(lambda: one.view.status == "ended")
        assert (one.view.error, one.view.sides[0].frames) == ("gated: the cable is out", 2)
        assert one.ask("And now?")  # of what was shown
        one.begin_anew()
        wait_until(lambda: one.view.error == "SOURCE: it is gone")
        one.begin_anew()
        wait_until(lambda: one.view.sides[0].frames >= FRAMES)


@pytest.mark.timeout(60)  # seconds; the wait that is to be ended is of ten minutes
def test_an_opening_that_waits_is_given_up(video: Path) -> None:
    """By the end of the stream, and by a further wish to begin anew."""
    sides = [Side(name="ours", session=session())]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        wanted = iter([address, video, address])

        def opening(interrupt: Interrupt) -> FrameSource:
            return open_source(next(wanted), live=LiveConfig(timeout=600), interrupt=interrupt)

        with shown(sides, open_source(video), opening) as one:
            wait_until(lambda: one.view.status == "ended")
            one.begin_anew()
            with silent.accept()[0]:
                assert one.view.status == "waiting"
                one.begin_anew()
                wait_until(lambda: one.view.status == "ended")
                assert (one.view.error, one.view.sides[0].frames) == ("", FRAMES)
            one.begin_anew()
            waited_for, _ = silent.accept()
        waited_for.close()
    assert one.view.error == ""


def test_sides_take_turns_in_coming_first(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes first shares the processor with the thread that makes the next frame ready."""
    order: list[str] = []
    show = ShownSide.show
    monkeypatch.setattr(ShownSide, "show", lambda self, *what: (order.append(self.side.name), show(self, *what)))
    with shown([Side(name=name, session=session()) for name in "ab"], open_source(video)) as both:
        wait_until(lambda: both.view.status == "ended")
    assert "".join(order) == ("abba" * FRAMES)[: 2 * FRAMES]


def test_a_pause_before_the_first_frame_ends(video: Path) -> None:
    source = Gated(decode_all(video))
    with shown([Side(name="ours", session=session())], source) as one:
        one.pause()
        assert one.view.status == "paused"
        one.go_on()
        assert one.view.status == "waiting"
        source.gate.release(1)
        wait_until(lambda: one.view.status == "playing")


def test_a_stream_that_a_fault_has_ended_begins_anew(video: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Memory may run out, for the baseline first of all."""

    class Full(Gated):
        def _moments(self) -> Iterator[Moment]:
            raise MemoryError("no room")
            yield

    with shown(
        [Side(name="ours", session=session())], Full(decode_all(video)), lambda interrupt: open_source(video)
    ) as one:
        wait_until(lambda: one.view.status == "ended")
        assert one.view.error == "MemoryError: no room"
        one.begin_anew()
        wait_until(lambda: one.view.sides[0].frames >= FRAMES)
    assert "no room" in capsys.readouterr().err


def test_a_file_that_plays_takes_its_time(video: Path) -> None:
    begin = time.monotonic()
    with shown([Side(name="ours", session=session())], open_source(video), showing=Showing(realtime=True)) as one:
        wait_until(lambda: one.view.status == "ended")
    assert time.monotonic() - begin >= (FRAMES - 1) / 4


def test_one_that_never_began_closes_its_source(video: Path) -> None:
    source = open_source(video)
    SideBySide([Side(name="ours", session=session())], source, refused).close()
    with pytest.raises(RuntimeError, match="closed already"):
        iter(source)


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
