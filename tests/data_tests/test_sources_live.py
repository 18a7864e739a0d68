"""Tests of hybridvl.data.sources with real streams on loopback: cut, found again, silent, lost for good and closed."""

import io
import signal
import threading
from functools import partial

import av
import numpy as np
import pytest
from PIL import Image
from stream_server import closed_port, serving
from video_cases import decode_all, write_video

from hybridvl.data.sources import LiveConfig, open_source
from hybridvl.data.sources.decoder import Decoder
from hybridvl.data.sources.interrupts import Interrupt
from hybridvl.data.sources.live import LiveSource
from hybridvl.data.sources.times import Clock
from hybridvl.layers import ConfigError

FOREVER = 600.0  # a wait that no test sits out


class TestClock(Clock):
    """Goes on by what is waited for, and by a fixed step at every look."""

    __test__ = False

    def __init__(self, step=0.0):
        self.time, self.step, self.waits = 100.0, step, []

    def now(self):
        self.time += self.step
        return self.time

    def wait(self, seconds, stop):
        self.waits.append(seconds)
        self.time += seconds
        return stop.is_set()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two transport streams: 10 frames at 5 a second, 6 frames of another size; and what they show."""
    folder = tmp_path_factory.mktemp("clips")
    paths = write_video(folder / "a.ts", 10, 5), write_video(folder / "b.ts", 6, 5, size=(96, 80))
    return [(path.read_bytes(), decode_all(path)) for path in paths]


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory):
    """A transport stream that is long enough to be opened before its end: 16 s of small frames."""
    return write_video(tmp_path_factory.mktemp("long") / "a.ts", 80, 5).read_bytes()


def until_lost(source):
    """The frames of a source, and why there are no more."""
    frames = []
    with pytest.raises(ConfigError) as caught:
        frames.extend(source)
    return frames, str(caught.value)


@pytest.mark.parametrize(("kind", "missing"), [("http", 0), ("rtsp", 1)])
def test_a_stream_that_is_cut_is_found_again(clips, kind, missing):
    """missing: the last frame before the cut of RTSP, whose packets FFmpeg does not know to be complete."""
    clock, config = TestClock(), LiveConfig(tries=3, pause=0.5, longest_pause=1.5)
    with serving([clips[0][0], None, clips[1][0], None], kind) as server:
        source = open_source(server.url, live=config, place="eye", clock=clock)
        assert source.live
        frames, message = until_lost(source)
    assert (source.reconnects, server.connections) == (1, 6)
    shown = [pixels for _, part in clips for pixels in part[: len(part) - missing]]
    for frame, expected in zip(frames, shown, strict=True):
        np.testing.assert_array_equal(frame.pixels, expected)
    # The clock stands still while frames come: from the last to the next one it went on by the two pauses alone.
    before, after = np.arange(10 - missing) / 5, np.arange(6 - missing) / 5
    times = [*before, *(before[-1] + 1.5 + after)]
    np.testing.assert_allclose([frame.time for frame in frames], times)
    assert clock.waits == [0.5, 1.0, 0.5, 1.0, 1.5]
    assert message.startswith(
        f"eye: stream {server.url} was lost after {len(shown)} frames, at second {times[-1]:.2f}, and not found again "
        "in 3 tries; the last one: "
    )


def test_frames_are_chosen_across_a_break(clips):
    (first, shown), (second, shown_after) = clips
    with serving([first, second, None]) as server:
        source = open_source(server.url, 1, live=LiveConfig(tries=1, pause=0.7), clock=TestClock())
        frames, message = until_lost(source)
    assert "not found again in 1 tries" in message
    assert [frame.time for frame in frames] == pytest.approx([0.0, 1.0, 2.5, 3.1])
    np.testing.assert_array_equal(frames[1].pixels, shown[5])
    np.testing.assert_array_equal(frames[3].pixels, shown_after[3])


def test_pictures_without_times_come_by_the_clock():
    pictures, expected = [], []
    for number in range(8):
        data = io.BytesIO()
        Image.new("RGB", (48, 32), (30 * number, 100, 50)).save(data, "JPEG")
        pictures.append(b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(data.getvalue()))
        pictures[-1] += data.getvalue() + b"\r\n"
        with av.open(io.BytesIO(data.getvalue()), format="jpeg_pipe") as container:
            expected.append(next(container.decode(video=0)).to_ndarray(format="rgb24"))
    with serving([b"".join(pictures), None], "parts") as server:
        frames, _ = until_lost(open_source(server.url, live=LiveConfig(tries=1), clock=TestClock(0.25)))
    np.testing.assert_array_equal([frame.pixels for frame in frames], expected[: len(frames)])
    assert len(frames) >= 7  # The last one may count as cut.
    assert [frame.time for frame in frames] == [0.25 * number for number in range(len(frames))]


def test_frames_that_are_damaged_are_left_out_and_counted(tmp_path):
    path = write_video(tmp_path / "a.mp4", 60, 15, codec="mpeg4", options={"movflags": "faststart"}, size=(320, 240))
    whole, data = decode_all(path), bytearray(path.read_bytes())
    middle = len(data) * 2 // 3
    data[middle : middle + 500] = bytes(500)
    path.write_bytes(data)
    interrupt = Interrupt()
    connect = partial(Decoder, str(path), "stream", interrupt)
    source = LiveSource(connect(), connect, interrupt, "stream", None, LiveConfig(), TestClock())
    frames = [frame for frame, _ in zip(source, range(50), strict=False)]
    source.close()
    assert source.damaged > 0
    assert len(frames) == 50
    np.testing.assert_array_equal([frame.pixels for frame in frames[:20]], whole[:20])


def test_a_video_of_known_length_is_read_like_a_file(clips, tmp_path):
    path = write_video(tmp_path / "a.mkv", 10, 5)
    with serving([path.read_bytes()], "file") as server, open_source(server.url) as source:
        frames = list(source)
        assert not source.live
    np.testing.assert_array_equal([frame.pixels for frame in frames], decode_all(path))
    assert server.connections == 1


@pytest.mark.parametrize("kind", ["http", "rtsp"])
def test_a_server_that_says_nothing_is_noticed(kind):
    with serving([[b""]], kind) as server:
        with pytest.raises(ConfigError, match=r"stream \S+ cannot be read: no answer in time"):
            open_source(server.url, live=LiveConfig(timeout=0.2))
        assert server.connections == 1


def test_a_stream_that_falls_silent_is_lost(long_clip):
    interrupt, found = Interrupt(), []
    with serving([[long_clip], None]) as server:
        connect = partial(Decoder, server.url, "stream", interrupt, timeout=FOREVER)
        source = LiveSource(connect(), connect, interrupt, "stream", None, LiveConfig(tries=1), TestClock())
        reader = threading.Thread(target=lambda: found.append(until_lost(source)))
        reader.start()
        assert server.silent.wait(60)
        while reader.is_alive():
            interrupt._put_forward()  # as if the timeout were over
            reader.join(0.01)
    ((frames, message),) = found
    assert 0 < len(frames) <= 80
    assert f"was lost after {len(frames)} frames" in message


def test_a_wait_at_opening_ends_with_an_interrupt_from_the_keyboard():
    with serving([[b""]]) as server:

        def press():
            assert server.silent.wait(60)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

        keyboard = threading.Thread(target=press)
        keyboard.start()
        with pytest.raises(KeyboardInterrupt):
            open_source(server.url, live=LiveConfig(timeout=FOREVER))
        keyboard.join()


def test_rtsp_goes_by_the_transport_that_is_asked_for(clips):
    with serving([clips[0][0]], "rtsp") as server:  # It refuses all but TCP.
        open_source(server.url, live=LiveConfig(transport="tcp")).close()
        with pytest.raises(ConfigError, match="cannot be read"):
            open_source(server.url, live=LiveConfig(transport="udp"))
        assert server.refused == 1


def test_a_dead_address_is_refused_without_its_password():
    with pytest.raises(ConfigError) as caught:
        open_source(f"rtsp://me:secret@127.0.0.1:{closed_port()}/x")
    assert "stream rtsp://me:***@127.0.0.1" in str(caught.value)
    assert "Connection refused" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("kind", ["http", "rtsp"])
def test_closing_ends_a_wait_for_the_network(long_clip, kind):
    with serving([[long_clip]], kind) as server:
        source, taken = open_source(server.url, live=LiveConfig(timeout=FOREVER)), []
        reader = threading.Thread(target=lambda: taken.extend(source))
        reader.start()
        assert server.silent.wait(60)
        source.close()
        reader.join(60)
        assert not reader.is_alive()
    assert source.reconnects == 0


def test_closing_ends_a_pause_between_tries(clips):
    (first, _), _ = clips
    with serving([first, None]) as server:
        source = open_source(server.url, live=LiveConfig(pause=FOREVER, longest_pause=FOREVER))
        reader = threading.Thread(target=lambda: list(source))
        reader.start()
        source.close()
        reader.join(60)
        assert not reader.is_alive()


def test_one_interrupt_leaves_other_sources_alone(clips):
    (first, shown), _ = clips
    with serving([first]) as one, serving([first]) as other:
        closed, read = open_source(one.url), open_source(other.url, live=LiveConfig(tries=1), clock=TestClock())
        frames = iter(read)
        next(frames)
        closed.close()
        with Interrupt().calls():
            pass
        assert len([next(frames) for _ in range(len(shown) - 1)]) == len(shown) - 1
        read.close()


def test_devices_are_read_by_the_name_of_their_format():
    """FFmpeg's device of test pictures stands for a camera, which this machine may not have."""
    interrupt = Interrupt()
    connect = partial(Decoder, "testsrc=size=64x48:rate=10", "camera", interrupt, format="lavfi", timeout=FOREVER)
    with LiveSource(connect(), connect, interrupt, "camera", 5, LiveConfig(), Clock()) as source:
        frames = [frame for frame, _ in zip(source, range(4), strict=False)]
    assert [frame.time for frame in frames] == pytest.approx([0.0, 0.2, 0.4, 0.6])
    assert all(frame.pixels.shape == (48, 64, 3) for frame in frames)


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        ({"tries": 0}, "live.tries: 0"),
        ({"timeout": 0}, "live.timeout: 0"),
        ({"pause": -1}, "live.pause: -1"),
        ({"longest_pause": float("inf")}, "live.longest_pause: inf"),
        ({"transport": "sctp"}, "live.transport: 'sctp'; expected one of tcp, udp"),
        ({"options": {"framerate": 30}}, "live.options: 'framerate'"),
    ],
)
def test_settings_that_are_none_are_refused(settings, place):
    with pytest.raises(ConfigError, match=place):
        LiveConfig(**settings)
