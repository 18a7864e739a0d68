"""A source shown to sessions side by side: each is what a session alone is, measured in bounded space, and asked."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from side_cases import FRAMES, Gated, alone, bars, frames_in, session, shown
from streaming_cases import equal_states, reply, stream_processor
from video_cases import decode_all
from waiting import wait_until

from hybridvl.data.sources import open_source
from hybridvl.inference.streaming.showing import Showing
from hybridvl.inference.streaming.sides import Side


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bars(tmp_path_factory.mktemp("side"))


def test_each_side_is_what_a_session_alone_is(video: Path) -> None:
    sides = [Side(name="ours", session=session()), Side(name="full", session=session("full*2"), answers=False)]
    with shown(sides, open_source(video)) as both:
        wait_until(lambda: both.view.status == "ended")
        view = both.view
    frames = frames_in(video)
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


def test_each_side_sees_frames_as_its_own_processor_makes_them(video: Path) -> None:
    """Also where two want frames of the same size."""
    processors = [stream_processor(), stream_processor(mean=(0.2, 0.5, 0.8), std=(0.5, 0.4, 0.3))]
    sides = [Side(name="", session=session(processor=processor)) for processor in processors]
    assert sides[0].session.steps.limits == sides[1].session.steps.limits
    with shown(sides, open_source(video)) as both:
        wait_until(lambda: both.view.status == "ended")
    wanted = [alone(frames_in(video), processor=processor) for processor in processors]
    assert all(equal_states(side.session, other) for side, other in zip(sides, wanted, strict=True))
    assert not equal_states(*wanted)


def test_questions_leave_no_trace_and_are_answered_as_by_a_session(video: Path) -> None:
    frames = frames_in(video)
    source = Gated(decode_all(video))
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
    frames = frames_in(video)
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


def test_a_pause_before_the_first_frame_ends(video: Path) -> None:
    source = Gated(decode_all(video))
    with shown([Side(name="ours", session=session())], source) as one:
        one.pause()
        assert one.view.status == "paused"
        one.go_on()
        assert one.view.status == "waiting"
        source.gate.release(1)
        wait_until(lambda: one.view.status == "playing")


def test_frames_that_come_during_a_pause_give_way_to_newer_ones(video: Path) -> None:
    source, side = Gated(decode_all(video)), Side(name="ours", session=session())
    with shown([side], source, showing=Showing(queue=1, drop="oldest")) as one:
        source.gate.release(1)
        wait_until(lambda: one.view.sides[0].frames == 1)
        assert one.view.dropped == 0
        one.pause()
        source.gate.release(5)
        wait_until(lambda: source.taken == 6)
        one.go_on()
        wait_until(lambda: one.view.time == 1.25)
        # The newest was in the queue, and the one before the queue, if the thread had come to take it, in hand.
        assert one.view.dropped in (3, 4)
        assert one.view.sides[0].frames == 6 - one.view.dropped
        times = [point.time for point in one.view.sides[0].points]
        assert equal_states(side.session, alone([frame for frame in frames_in(video) if frame[1] in times]))
