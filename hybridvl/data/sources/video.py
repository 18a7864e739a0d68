"""Video files, and videos of a known length on the network, as sources of frames."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from hybridvl.data.sources.decoder import Decoder
from hybridvl.data.sources.frames import FrameSource, Moment
from hybridvl.data.sources.interrupts import Interrupt
from hybridvl.data.sources.times import Timeline
from hybridvl.data.video_stream import Unreadable, display_matrix, upright_pixels
from hybridvl.layers.errors import ConfigError


class VideoSource(FrameSource):
    """The frames of a video from its first to its last, decoded as they are asked for.

    Nothing is read beforehand: a file that is cut or damaged gives its frames up to there, and then an error.

    Args:
        decoder: the opened video.
        interrupt: the decoder's.
        name: what an error message calls it.
        fps: frames to give a second; None gives every frame.
    """

    def __init__(self, decoder: Decoder, interrupt: Interrupt, name: str, fps: float | None) -> None:
        super().__init__(name, fps, interrupt=interrupt)
        self._decoder = decoder

    def _moments(self) -> Iterator[Moment]:
        timeline = Timeline(1 / self._decoder.rate)
        count, time, matrix = 0, 0.0, None
        self._decoder.use_threads()
        try:
            for frame in self._decoder.whole_frames():
                if not count:
                    matrix = display_matrix(frame)
                time = timeline.place(self._decoder.own_time(frame))
                count += 1
                yield time, partial(upright_pixels, frame, matrix)
        except Unreadable as error:
            if self._closed.is_set():
                return
            where = f"after {count} frames, at second {time:.2f}"
            raise ConfigError(f"{self.name} cannot be read on {where}: {error.reason}") from error

    def _release(self) -> None:
        self._decoder.close()
