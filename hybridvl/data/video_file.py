"""Video files by PyAV: how many frames one holds, at which rate, and chosen frames of it decoded."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybridvl.layers.errors import ConfigError

_STILL = ("image2", "tty")
"""Formats in which FFmpeg takes a picture or a text for a video; so are all whose name ends with `_pipe`."""


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
        self._source = source
        self._where = place
        self._name = f"of {len(source)} bytes" if isinstance(source, bytes) else str(source)
        if not isinstance(source, bytes) and not Path(source).is_file():
            raise self._error("no such file")
        if not (len(source) if isinstance(source, bytes) else Path(source).stat().st_size):
            raise self._error("it is empty")
        with self._opened() as (container, stream):
            rate = float(stream.average_rate or stream.guessed_rate or 0)
            promised, shown, damaged = _promised_seconds(container, stream), 0.0, False
            self.frames = 0
            for packet in container.demux(stream):
                if packet.size:
                    self.frames += not packet.is_discard
                    damaged |= packet.is_corrupt
                    shown = max(shown, _seconds(packet, promised))
        if not self.frames or not rate:
            raise self._error(f"it has {self.frames} frames at {rate:g} a second")
        # A packet cut in two is marked; a file cut between packets is shorter than its header says.
        if damaged or shown < promised - max(2 / rate, 1.0, promised / 20):
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
                    # Of one frame alone: asking for side data makes a frame that is freed late.
                    matrix = _display_matrix(frame)
                if index is None:
                    return
                if number == index:
                    if frame.is_corrupt:
                        raise self._error(f"frame {index} of {self.frames} is damaged")
                    # In one thread: a forked worker that frees what its parent left would wait for the others for ever.
                    pixels = _upright(frame.to_ndarray(format="rgb24", threads=1), matrix)
                    while index == number:
                        yield pixels
                        index = next(wanted, None)
        if index is not None:
            raise self._error(f"frame {index} of {self.frames} cannot be decoded")

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """The container and its video stream; what FFmpeg complains about within becomes a ConfigError."""
        import av  # lazily: it brings FFmpeg with it

        source = io.BytesIO(self._source) if isinstance(self._source, bytes) else str(self._source)
        try:
            # Titles and the like need not be in UTF-8.
            with av.open(source, metadata_errors="replace") as container:
                pictures = av.stream.Disposition.attached_pic
                streams = [stream for stream in container.streams.video if not stream.disposition & pictures]
                name = container.format.name
                if not streams or name in _STILL or name.endswith("_pipe"):
                    raise self._error(f"it holds no video (format {name})")
                yield container, streams[0]
        except av.FFmpegError as error:
            raise self._error(error.strerror or type(error).__name__) from error
        except IndexError as error:  # PyAV's own, of a packet of a stream that the header does not name
            raise self._error("it is damaged") from error

    def _error(self, reason: str) -> ConfigError:
        return ConfigError(f"{self._where}: video {self._name} cannot be read: {reason}")


def _display_matrix(frame: Any) -> list[int] | None:
    """[a, b, c, d]: the point (x, y) of a frame is to be shown at (a x + c y, b x + d y); None if it is not said."""
    shown = frame.side_data.get("DISPLAYMATRIX")
    return None if shown is None else np.frombuffer(bytes(shown), np.int32)[[0, 1, 3, 4]].tolist()


def _upright(pixels: NDArray[np.uint8], matrix: list[int] | None) -> NDArray[np.uint8]:
    """Pixels (H, W, 3) turned by quarters and mirrored as a display matrix says."""
    if matrix is None:
        return pixels
    a, b, c, d = matrix
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def _promised_seconds(container: Any, stream: Any) -> float:
    """How long the header says that the stream is; 0 where it says nothing, or only how long sound and video are."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    only = len(container.streams) == 1 and container.duration
    return container.duration / 1_000_000 if only else 0.0


def _seconds(packet: Any, unknown: float) -> float:
    """When a packet is shown, or else when it is decoded."""
    time = packet.dts if packet.pts is None else packet.pts
    return unknown if time is None else float(time * packet.time_base)
