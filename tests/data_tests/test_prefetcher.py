"""Tests of hybridvl.data.sources.prefetch: order, drops, pacing, errors, and threads that end."""

import signal
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from stream_server import serving
from video_cases import write_video

from hybridvl.data.sources import FrameSource, LiveConfig, Prefetcher, TimedFrame, open_source
from hybridvl.data.sources.frames import Moment
from hybridvl.data.sources.times import Clock
from hybridvl.layers import ConfigError

LONG = 60.0  # Only a failure waits so long.


def frames(times):
    return [TimedFrame(np.full((1, 1, 3), number % 256, np.uint8), time) for number, time in enumerate(times)]


def second(frame):
    return frame.time


class Steps:
    """A source that gives one frame for every `let`, and says when it is asked for the next."""

    def __init__(self):
        self.allowed, self.asked = threading.Semaphore(0), threading.Semaphore(0)
        self.given = 0

    def __iter__(self):
        while True:
            self.asked.release()
            assert self.allowed.acquire(timeout=LONG)
            yield frames([0.0])[0] if not self.given else TimedFrame(np.zeros((1, 1, 3), np.uint8), float(self.given))
            self.given += 1

    def let(self, count):
        """Give so many frames, and return when the thread has dealt with each and asks for another."""
        for _ in range(count):
            assert self.asked.acquire(timeout=LONG)
            self.allowed.release()
        assert self.asked.acquire(timeout=LONG)
        self.asked.release()


class Waiting(FrameSource):
    """A source that gives some frames, and then waits until it is closed."""

    def __init__(self, count=0, live=True):
        super().__init__("waiting", None, live=live)
        self.count, self.waiting, self.released = count, threading.Event(), 0

    def _moments(self):
        for number in range(self.count):
            yield float(number), lambda: np.zeros((1, 1, 3), np.uint8)
        self.waiting.set()
        assert self._closed.wait(LONG)

    def _release(self):
        self.released += 1


class Wall(Clock):
    """A clock that only waiting moves."""

    def __init__(self):
        self.time, self.waits = 50.0, []

    def now(self):
        return self.time

    def wait(self, seconds, stop):
        self.waits.append(seconds)
        self.time += seconds
        return stop.is_set()


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name == "prefetch"] == []


@pytest.mark.parametrize("size", [1, 3, 100])
def test_every_frame_in_order(size):
    times = [number / 7 for number in range(50)]
    prefetcher = Prefetcher(frames(times), second, size=size)
    assert list(prefetcher) == times
    assert (prefetcher.dropped, prefetcher.released) == (0, 50)
    assert [frame.time for frame in Prefetcher(frames(times))] == times


def test_frames_are_prepared_in_another_thread_and_ahead():
    third, threads = threading.Event(), []

    def prepare(frame):
        threads.append(threading.current_thread())
        if frame.time == 2:
            third.set()
        return frame.time

    taken = iter(Prefetcher(frames(range(5)), prepare, size=2))
    assert next(taken) == 0
    assert third.wait(LONG)  # although the second was not taken yet
    assert list(taken) == [1, 2, 3, 4]
    assert threading.current_thread() not in threads


def test_never_dropping_lets_the_source_wait():
    source = Steps()
    prefetcher = Prefetcher(source, second, size=2)
    prefetcher.start()
    taken = iter(prefetcher)
    source.let(2)
    assert source.asked.acquire(timeout=LONG)
    source.allowed.release()  # The third finds the queue full: the source is not asked again before there is room.
    assert not source.asked.acquire(timeout=0.02)
    assert [next(taken) for _ in range(3)] == [0, 1, 2]
    assert source.asked.acquire(timeout=LONG)
    source.allowed.release()
    assert next(taken) == 3
    assert prefetcher.dropped == 0
    source.allowed.release()
    prefetcher.close()


def test_the_oldest_give_way_and_are_counted():
    source = Steps()
    prefetcher = Prefetcher(source, second, size=3, drop="oldest")
    prefetcher.start()
    taken = iter(prefetcher)
    source.let(3)
    assert prefetcher.dropped == 0
    source.let(5)
    assert prefetcher.dropped == 5
    assert [next(taken), next(taken)] == [5, 6]
    source.let(2)
    assert prefetcher.dropped == 5
    source.let(1)
    assert (prefetcher.dropped, prefetcher.released) == (6, 11)
    assert [next(taken) for _ in range(3)] == [8, 9, 10]
    source.allowed.release()
    prefetcher.close()
    assert list(taken) == []


def test_frames_are_released_at_their_own_times():
    clock = Wall()
    times = [0.0, 0.5, 0.75, 2.0]
    released = Prefetcher(frames(times), lambda frame: (frame.time, clock.time), size=10, realtime=True, clock=clock)
    # Each is prepared while the one before it is shown.
    assert list(released) == [(0.0, 50.0), (0.5, 50.0), (0.75, 50.5), (2.0, 50.75)]
    assert clock.waits == [0.5, 0.25, 1.25]


def test_what_is_late_is_released_at_once():
    clock = Wall()

    def slow(frame):
        clock.time += 0.6 if frame.time == 1 else 0.0
        return frame.time

    times = [0.0, 0.5, 1.0, 1.25, 2.0]
    assert list(Prefetcher(frames(times), slow, size=10, realtime=True, clock=clock)) == times
    # Prepared from 0.5 to 1.1, the third frame is late, the fourth waits less.
    assert clock.waits == pytest.approx([0.5, 0.15, 0.75])


def test_live_sources_are_not_held_back():
    clock = Wall()
    source = Waiting(3)
    prefetcher = Prefetcher(source, second, realtime=True, clock=clock)
    taken = iter(prefetcher)
    assert [next(taken) for _ in range(3)] == [0, 1, 2]
    prefetcher.close()
    assert clock.waits == []


@pytest.mark.parametrize("drop", ["never", "oldest"])
@pytest.mark.parametrize("error", [ConfigError("it is damaged"), KeyError("x"), MemoryError(), KeyboardInterrupt()])
def test_errors_come_after_the_frames_before_them(drop, error):
    def source():
        yield from frames(range(3))
        raise error

    found, prefetcher = [], Prefetcher(source(), second, size=5, drop=drop)
    with pytest.raises(type(error)) as caught:
        found.extend(prefetcher)
    assert caught.value is error
    assert found == [0, 1, 2]


def test_mistakes_of_prepare_are_raised_in_the_loop():
    def prepare(frame):
        return 1 / (2 - frame.time)

    found = []
    with pytest.raises(ZeroDivisionError):
        found.extend(Prefetcher(frames(range(5)), prepare))
    assert found == [0.5, 1.0]


@pytest.mark.parametrize("way", ["break", "raise", "interrupt", "with", "close"])
def test_leaving_the_loop_ends_the_thread_and_closes_the_source(way):
    source = Waiting(10, live=False)
    prefetcher = Prefetcher(source, size=2)  # The thread waits for room.
    if way != "break":
        prefetcher.start()
    if way == "break":
        for _ in prefetcher:
            break
    elif way == "close":
        taken = iter(prefetcher)
        next(taken)
        prefetcher.close()
        assert list(taken) == []
    elif way == "with":
        with prefetcher:
            pass
    else:
        error = ValueError if way == "raise" else KeyboardInterrupt
        with pytest.raises(error):  # noqa: PT012
            for _ in prefetcher:
                raise error
    assert source.released
    with pytest.raises(RuntimeError, match="read or closed already"):
        iter(source)
    with pytest.raises(RuntimeError, match="a prefetcher is read once"):
        iter(prefetcher)
    prefetcher.close()


def test_closing_ends_a_source_that_waits_and_a_loop_that_waits():
    source, found = Waiting(2), []
    prefetcher = Prefetcher(source, second)
    consumer = threading.Thread(target=lambda: found.extend(prefetcher))
    consumer.start()
    assert source.waiting.wait(LONG)
    prefetcher.close()
    consumer.join(LONG)
    assert not consumer.is_alive()
    assert found in ([], [0], [0, 1])  # What was not taken before the end is not given after it.


def test_an_interrupt_from_the_keyboard_ends_a_loop_that_waits():
    source = Waiting(1)

    def press():
        assert source.waiting.wait(LONG)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    keyboard = threading.Thread(target=press)
    keyboard.start()
    with pytest.raises(KeyboardInterrupt):
        list(Prefetcher(source, second))
    keyboard.join()
    assert source.released


def test_closing_ends_a_wait_for_the_wall_clock():
    source = frames([0.0, 1e6])
    prefetcher = Prefetcher(source, second, realtime=True)
    taken = iter(prefetcher)
    assert next(taken) == 0
    prefetcher.close()
    assert list(taken) == []


def test_closing_ends_a_wait_for_the_network(tmp_path):
    clip = write_video(tmp_path / "a.ts", 80, 5).read_bytes()
    with serving([[clip]]) as server:
        prefetcher = Prefetcher(open_source(server.url, live=LiveConfig(timeout=600)), second, drop="oldest")
        taken = iter(prefetcher)
        assert next(taken) >= 0
        assert server.silent.wait(LONG)
        prefetcher.close()


def test_a_file_is_read_to_its_end_and_its_error(tmp_path):
    path = write_video(tmp_path / "a.mkv", 60, 15)
    with open_source(path) as source:
        assert list(Prefetcher(source, second)) == pytest.approx([n / 15 for n in range(60)], abs=0.001)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.6)])
    found = []
    with pytest.raises(ConfigError, match="cannot be read on after"):
        found.extend(Prefetcher(open_source(path), second, size=1))
    assert len(found) > 5


@pytest.mark.parametrize(("settings", "place"), [({"size": 0}, "prefetch.size: 0"), ({"drop": "new"}, "prefetch.drop")])
def test_settings_that_are_none_are_refused(settings, place):
    with pytest.raises(ConfigError, match=place):
        Prefetcher([], **settings)


def test_a_source_that_cannot_be_closed_is_an_error_of_the_loop() -> None:
    class Stuck(FrameSource):
        def _moments(self) -> Iterator[Moment]:
            yield from ()

        def _release(self) -> None:
            raise OSError("the device is gone")

    with pytest.raises(OSError, match="the device is gone"):
        list(Prefetcher(Stuck("stuck", None)))
