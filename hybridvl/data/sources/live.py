"""Cameras and streams on the network as sources of frames: they may be lost, and are then looked for again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from hybridvl.data.checks import is_finite, require_whole
from hybridvl.data.sources.decoder import Decoder
from hybridvl.data.sources.frames import FrameSource, Moment
from hybridvl.data.sources.interrupts import Interrupt
from hybridvl.data.sources.times import Clock, Timeline
from hybridvl.data.video_stream import Unreadable, display_matrix, upright_pixels
from hybridvl.layers.errors import ConfigError

TRANSPORTS = ("tcp", "udp")


@dataclass(frozen=True)
class LiveConfig:
    """How cameras and streams on the network are read.

    Attributes:
        timeout: a connection that gives nothing for so many seconds is lost.
        tries: how often a lost one is looked for, counted from its last frame; the opening is tried once.
        pause: seconds before the first of these tries; doubled before each further one.
        longest_pause: the pause grows up to this, in seconds.
        transport: how RTSP carries the video: "tcp" loses nothing, "udp" does not wait for what was lost.
        options: further options of FFmpeg, such as {"video_size": "1280x720", "framerate": "30"} for a camera.
    """

    timeout: float = 10.0
    tries: int = 5
    pause: float = 0.5
    longest_pause: float = 10.0
    transport: str = "tcp"
    options: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_whole("live.tries", self.tries)
        for name in ("timeout", "pause", "longest_pause"):
            value = getattr(self, name)
            if not is_finite(value) or not 0 < value <= 86_400:
                raise ConfigError(f"live.{name}: {value!r:.80}; expected seconds, above 0 and up to 86400")
        if self.transport not in TRANSPORTS:
            raise ConfigError(f"live.transport: {self.transport!r:.80}; expected one of {', '.join(TRANSPORTS)}")
        strange = [key for key, value in self.options.items() if not isinstance(key, str) or not isinstance(value, str)]
        if strange:
            raise ConfigError(f"live.options: {strange[0]!r:.80}; expected texts as names and as values")


class LiveSource(FrameSource):
    """The frames of a camera or a stream as they come.

    When it breaks off it is looked for again; the time from the last frame before to the first after is that of the
    wall clock. Frames that cannot be decoded whole are left out and counted in `damaged`.

    Args:
        decoder: the opened stream.
        connect: opens it again.
        interrupt: ends waiting of both.
        name: what an error message calls it.
        fps: frames to give a second; None gives every frame.
        config: how it is read.
        clock: the wall clock.
    """

    def __init__(
        self,
        decoder: Decoder,
        connect: Callable[[], Decoder],
        interrupt: Interrupt,
        name: str,
        fps: float | None,
        config: LiveConfig,
        clock: Clock,
    ) -> None:
        super().__init__(name, fps, live=True, interrupt=interrupt)
        self._decoder = decoder
        self._connect = connect
        self._config = config
        self._clock = clock
        self._timeline = Timeline(1 / decoder.rate)
        self._time = 0.0
        self._count = 0
        self._arrived: float | None = None
        self._tries = 0

    def _moments(self) -> Iterator[Moment]:
        while True:
            reason = "it ended"
            try:
                yield from self._connection()
            except Unreadable as error:
                reason = error.reason
            finally:
                self._decoder.close()
            if self._closed.is_set() or not self._found_again(reason):
                return

    def _connection(self) -> Iterator[Moment]:
        """The frames until the connection breaks off."""
        decoder, matrix, first = self._decoder, None, True
        before = self.damaged
        for frame in decoder.good_frames():
            now = self._clock.now()
            own = decoder.own_time(frame) if decoder.timed else now
            passed = 0.0 if self._arrived is None else now - self._arrived
            if first:
                matrix = display_matrix(frame)
            if first and self._arrived is not None:
                self.reconnects += 1
                self._time = self._timeline.resume(own, passed)
            else:
                self._time = self._timeline.place(own, passed)
            first, self._arrived, self._tries = False, now, 0
            self._count += 1
            self.damaged = before + decoder.damaged
            yield self._time, partial(upright_pixels, frame, matrix)
        self.damaged = before + decoder.damaged

    def _found_again(self, reason: str) -> bool:
        """Whether a new connection could be made before the source was closed; ConfigError after the last try."""
        while self._tries < self._config.tries:
            pause = min(self._config.pause * 2.0**self._tries, self._config.longest_pause)
            self._tries += 1
            if self._clock.wait(pause, self._closed):
                return False
            try:
                self._decoder = self._connect()
                return True
            except Unreadable as error:
                reason = error.reason
                if self._closed.is_set():
                    return False
        raise ConfigError(
            f"{self.name} was lost after {self._count} frames, at second {self._time:.2f}, and not found again in "
            f"{self._tries} tries; the last one: {reason}"
        )

    def _release(self) -> None:
        self._decoder.close()
