"""Tests of hybridvl.data.sources.times: which frames a rate chooses, and times that always go on."""

import threading
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridvl.data.sources.times import Clock, Sampler, Timeline

RATES = st.sampled_from([0.1, 0.5, 1, 2, 2.5, 8, 12.5, 24, 30, 59.94, 240, 1000, 5000])
STEPS = st.lists(st.integers(1, 700), max_size=80)  # in milliseconds


def chosen(times, fps):
    sampler = Sampler(fps)
    return [time for time in times if sampler.takes(time)]


def rounding(fps):
    return min(Fraction(1, 1000), 1 / (4 * Fraction(fps))) + Fraction(1, 10**9)


def by_periods(times, fps):
    """The same choice, period by period and in fractions."""
    fps, slack, found = Fraction(fps), rounding(fps), []
    times = [Fraction(round(time * 1000), 1000) for time in times]
    for period in sorted({(time + slack) * fps // 1 for time in times}):
        inside = [time for time in times if period / fps <= time + slack < (period + 1) / fps]
        far = [time for time in inside if not found or time - found[-1] >= 1 / (2 * fps) - slack]
        found += far[:1]
    return [float(time) for time in found]


@given(STEPS, RATES)
def test_the_choice_is_that_of_the_definition(steps, fps):
    times = [sum(steps[:number]) / 1000 for number in range(len(steps) + 1)]
    found = chosen(times, fps)
    assert found == by_periods(times, fps)
    assert found[0] == 0


@given(st.lists(st.floats(0, 5), max_size=60), RATES)
def test_none_is_too_close_and_none_that_was_due_is_missing(steps, fps):
    times = [sum(steps[:number]) for number in range(len(steps) + 1)]
    found, slack = chosen(times, fps), float(rounding(fps)) + 1e-9
    assert all(after - before >= 0.5 / fps - slack for before, after in pairwise(found))
    for time in times:
        last = max(taken for taken in found if taken <= time)
        same_period = int((last + slack) * fps) >= int((time + slack) * fps) - 1e-6
        assert last == time or same_period or time - last < 0.5 / fps + slack


@pytest.mark.parametrize(("rate", "fps"), [(30, 8), (30, 25), (25, 10), (60, 24), (29.97, 1), (15, 2), (24, 30)])
def test_an_even_stream_keeps_the_rate(rate, fps):
    found = chosen([number / rate for number in range(int(60 * rate))], fps)
    assert abs(len(found) - 60 * min(rate, fps)) <= 1


@pytest.mark.parametrize("rate", [10, 15, 24, 25, 29.97, 30, 50, 59.94, 60, 100, 120])
def test_every_frame_of_a_stream_at_its_own_rate_is_chosen(rate):
    exact = [number / rate for number in range(2000)]
    assert chosen(exact, rate) == exact
    for start in (0.0, 0.0005, 1234.5678):  # Times in whole milliseconds, as Matroska keeps them.
        whole = [round(start + time, 3) - round(start, 3) for time in exact]
        assert chosen(whole, rate) == whole


def test_without_a_rate_every_frame_is_chosen():
    times = [0.0, 0.001, 0.001, 7.0]
    assert chosen(times, None) == times


def placed(owns, step=0.1):
    timeline = Timeline(step)
    return [timeline.place(own) for own in owns]


def test_times_begin_at_zero():
    assert placed([5.0, 5.25, 5.75]) == [0.0, 0.25, 0.75]
    assert placed([-0.5, 0.0, 0.25]) == [0.0, 0.5, 0.75]


def test_frames_without_times_come_a_step_after_one_another():
    assert placed([None, None, None], 0.25) == [0.0, 0.25, 0.5]
    assert placed([3.0, 3.5, None, 4.5], 0.25) == [0.0, 0.5, 1.0, 1.5]  # the step is that of the frames before


def test_what_is_out_of_turn_does_not_move_what_follows():
    assert placed([0.0, 0.1, 0.05, 0.2, 0.2, 0.3]) == pytest.approx([0.0, 0.1, 0.101, 0.2, 0.201, 0.3])


def test_a_new_clock_goes_on_after_the_old_one():
    assert placed([7.0, 7.2, 7.4, 0.0, 0.2, 0.6]) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.2])


def test_long_gaps_of_a_file_are_kept():
    assert placed([0.0, 3600.0, 3600.5]) == [0.0, 3600.0, 3600.5]


def test_leaps_of_a_live_stream_are_told_by_the_wall_clock():
    timeline = Timeline(0.1)
    own = [(1.0, 0.0), (1.5, 0.5), (1_000_000.0, 0.5), (1_000_000.25, 0.0), (1_000_030.25, 29.0), (5.0, 0.75)]
    assert [timeline.place(*moment) for moment in own] == pytest.approx([0.0, 0.5, 1.0, 1.25, 31.25, 32.0])
    # Who reads slowly finds frames that waited: their own times count.
    assert timeline.place(5.1, 60.0) == pytest.approx(32.1)


def test_a_break_lasts_as_long_as_the_wall_clock_says():
    timeline = Timeline(0.1)
    assert timeline.resume(9.0, 5.0) == 0.0  # nothing came before it
    assert timeline.place(9.5) == 0.5
    assert timeline.resume(77.0, 4.0) == 4.5
    assert timeline.place(77.5) == 5.0
    assert timeline.resume(0.0, 0.0) > 5.0


@given(st.lists(st.none() | st.floats(-1e6, 1e6), max_size=50), st.booleans())
def test_times_always_go_on(owns, live):
    timeline = Timeline(0.04)
    times = [timeline.place(own, 0.0 if live else None) for own in owns]
    assert all(before < after for before, after in pairwise(times))


def test_the_clock_waits_and_is_stopped():
    clock, stop = Clock(), threading.Event()
    before = clock.now()
    assert not clock.wait(0.01, stop)
    assert clock.now() - before >= 0.01
    assert not clock.wait(-5, stop)
    stop.set()
    assert clock.wait(3600, stop)
