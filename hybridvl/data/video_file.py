"""Video files by PyAV: how many frames one holds, at which rate, and chosen frames of it decoded."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybridvl.data.video_stream import (
    Length,
    Unreadable,
    display_matrix,
    explained,
    frame_rate,
    open_video,
    require_file,
    upright_pixels,
)
from hybridvl.layers.errors import ConfigError


class VideoFile:
    """A file's first video stream.

    Opening reads the file once without decoding it, so that a truncated one is found out before any work is done.

    Args:
        source: a file, or an encoded file's bytes.
        place: what an error message calls it.

    Attributes:
        frames: number of frames.
        rate: frames a second, on average.

    Raises:
        ConfigError: naming the file, when it is missing, empty, damaged, or no video.
    """

    def __init__(self, source: str | Path | bytes, place: str = "video") -> None:
        self._name = f"{place}: video " + (f"of {len(source)} bytes" if isinstance(source, bytes) else str(source))
        if isinstance(source, bytes) and not source:
            raise self._error("it is empty")
        self._source = source if isinstance(source, bytes) else require_file(source, self._name)
        with self._opened() as (container, stream):
            rate = frame_rate(stream)
            length, damaged = Length(container, stream), False
            self.frames = 0
            for packet in container.demux(stream):
                if packet.size:
                    self.frames += not packet.is_discard
                    damaged |= packet.is_corrupt
                    length.see(packet)
        if not self.frames or not rate:
            raise self._error(f"it has {self.frames} frames at {rate:g} a second")
        # A packet cut in two is marked; a file cut between packets is shorter than its header says.
        if damaged or length.falls_short(rate):
            raise self._error("it is truncated")
        self.rate = rate

    def read(self, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """The frames with these numbers (in ascending order, from 0), each (H, W, 3) uint8 RGB and upright.

        A file of a camera that was held otherwise says how its frames are to be turned; they are, as players do it.
        """
        wanted = iter(indices)
        index = next(wanted, None)
        with self._opened() as (container, stream):
            matrix: list[int] | None = None
            for number, frame in enumerate(container.decode(stream)):
                if number == 0:
                    matrix = display_matrix(frame)
                if index is None:
                    return
                if number == index:
                    if frame.is_corrupt:
                        raise self._error(f"frame {index} of {self.frames} is damaged")
                    pixels = upright_pixels(frame, matrix)
                    while index == number:
                        yield pixels
                        index = next(wanted, None)
        if index is not None:
            raise self._error(f"frame {index} of {self.frames} cannot be decoded")

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """The container and its video stream; what FFmpeg complains about within becomes a ConfigError."""
        source = io.BytesIO(self._source) if isinstance(self._source, bytes) else self._source
        container, stream = open_video(source, self._name)
        with container, explained(self._name):
            yield container, stream

    def _error(self, reason: str) -> ConfigError:
        return Unreadable(self._name, reason)
