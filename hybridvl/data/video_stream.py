"""What all readers of videos share: the stream that is shown, how its frames are turned, and what went wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybridvl.layers.errors import ConfigError

_STILL = ("image2", "tty")
"""Formats in which FFmpeg takes a picture or a text for a video; so are all whose name ends with `_pipe`."""


class Unreadable(ConfigError):
    """A video that cannot be read, or not on.

    Args:
        name: which one.
        reason: why, in a few words.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.reason = reason

    def __str__(self) -> str:
        return "{} cannot be read: {}".format(*self.args)


def open_video(
    source: Any,
    name: str,
    format: str | None = None,
    options: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> tuple[Any, Any]:
    """PyAV's container of a video and the stream of it that is shown: the first that is no cover picture.

    Args:
        source: a path, a URL, or a binary file object.
        name: what an error message calls it.
        format: FFmpeg's name of the format; None is to find it out.
        options: FFmpeg's options of the format.
        timeout: longest wait for the other side, in seconds, when opening and then for every packet.

    Raises:
        Unreadable: it cannot be opened or holds no video.
    """
    import av  # lazily: it brings FFmpeg with it

    with explained(name):
        # Titles and the like need not be in UTF-8.
        container = av.open(
            source, "r", format=format, options=dict(options or {}), metadata_errors="replace", timeout=timeout
        )
    pictures = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & pictures]
    kind = container.format.name
    if not streams or kind in _STILL or kind.endswith("_pipe"):
        container.close()
        raise Unreadable(name, f"it holds no video (format {kind})")
    return container, streams[0]


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn what FFmpeg complains about within the block into an Unreadable."""
    import av

    try:
        yield
    except av.ExitError as error:
        raise Unreadable(name, "no answer in time") from error
    except av.FFmpegError as error:
        # Without the address that was read, which str(error) would name: it may hold a password.
        raise Unreadable(name, error.strerror or type(error).__name__) from error
    except IndexError as error:  # PyAV's own, of a packet of a stream that the header does not name
        raise Unreadable(name, "it is damaged") from error


def frame_rate(stream: Any) -> float:
    """Frames a second on average, as the header says or FFmpeg guesses; 0 where neither can tell."""
    return float(stream.average_rate or stream.guessed_rate or 0)


def display_matrix(frame: Any) -> list[int] | None:
    """[a, b, c, d]: the point (x, y) of a frame is to be shown at (a x + c y, b x + d y); None if it is not said.

    To be asked of a first frame alone: asking for side data makes a frame that is freed late.
    """
    shown = frame.side_data.get("DISPLAYMATRIX")
    return None if shown is None else np.frombuffer(bytes(shown), np.int32)[[0, 1, 3, 4]].tolist()


def upright_pixels(frame: Any, matrix: list[int] | None) -> NDArray[np.uint8]:
    """A frame as (H, W, 3) uint8 RGB, turned by quarters and mirrored as a display matrix says."""
    # In one thread: a forked worker that frees what its parent left would wait for the others for ever.
    pixels: NDArray[np.uint8] = frame.to_ndarray(format="rgb24", threads=1)
    if matrix is None:
        return pixels
    a, b, c, d = matrix
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


class Length:
    """How long a stream is by its header, and how much of it was seen; all in seconds.

    Args:
        container: PyAV's container.
        stream: its video stream.

    Attributes:
        promised: what the header says; 0 where it says nothing, or only how long sound and video are together.
        shown: the latest moment of a packet so far.
    """

    def __init__(self, container: Any, stream: Any) -> None:
        self.shown = 0.0
        if stream.duration:
            self.promised = float(stream.duration * stream.time_base)
        else:
            only = len(container.streams) == 1 and container.duration
            self.promised = container.duration / 1_000_000 if only else 0.0

    def see(self, packet: Any) -> None:
        """Count in a packet by when it is shown, or else by when it is decoded."""
        time = packet.dts if packet.pts is None else packet.pts
        self.shown = max(self.shown, self.promised if time is None else float(time * packet.time_base))

    def falls_short(self, rate: float) -> bool:
        """Whether so much is missing that a file of `rate` frames a second must have been cut."""
        return self.shown < self.promised - max(2 / rate, 1.0, self.promised / 20)


def require_file(path: str | Path, name: str) -> str:
    """The full path of a file, which FFmpeg cannot take for the address of anything else.

    Raises:
        Unreadable: there is none, or it is empty.
    """
    if not Path(path).is_file():
        raise Unreadable(name, "no such file")
    if not Path(path).stat().st_size:
        raise Unreadable(name, "it is empty")
    return str(Path(path).absolute())
