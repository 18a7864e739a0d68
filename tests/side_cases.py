"""What the tests of sessions side by side share: a source that is let through, sessions, and a stream that is shown."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from streaming_cases import stream_model, stream_processor
from video_cases import decode_all, write_video

from hybridvl.data.sources import FrameSource
from hybridvl.data.sources.frames import Moment
from hybridvl.data.sources.interrupts import Interrupt
from hybridvl.inference.processor import Processor
from hybridvl.inference.streaming import StreamingSession
from hybridvl.inference.streaming.side_by_side import SideBySide
from hybridvl.inference.streaming.sides import Side
from hybridvl.layers.errors import ConfigError

FRAMES, RATE = 14, 4


class Gated(FrameSource):
    """Frames of a video that come one at a time, when they are let through.

    Attributes:
        gate: a frame comes for each release of it.
        taken: frames that whoever reads has done with: the next one is asked for.
    """

    def __init__(self, pixels: np.ndarray, fails: bool = False) -> None:
        super().__init__("gated", None)
        self._pixels, self._fails = pixels, fails
        self.gate, self.taken = threading.Semaphore(0), 0

    def _moments(self) -> Iterator[Moment]:
        for number in range(len(self._pixels)):
            while not self.gate.acquire(timeout=0.05):
                if self._closed.is_set():
                    return
            yield number / RATE, lambda number=number: self._pixels[number]
            self.taken = number + 1
        if self._fails:
            raise ConfigError("gated: the cable is out")

    def _release(self) -> None:
        pass


def bars(folder: Path) -> Path:
    """A video of FRAMES frames, RATE a second."""
    return write_video(folder / "bars.mp4", frames=FRAMES, rate=RATE)


def frames_in(video: Path) -> list[tuple[np.ndarray, float]]:
    """All frames of it, with their times."""
    return [(pixels, number / RATE) for number, pixels in enumerate(decode_all(video))]


def session(pattern: str = "swa gdn", processor: Processor | None = None) -> StreamingSession:
    """One that was shown nothing."""
    return StreamingSession(stream_model(pattern), processor or stream_processor())


def alone(
    frames: Iterable[tuple[np.ndarray, float]], pattern: str = "swa gdn", processor: Processor | None = None
) -> StreamingSession:
    """One that was shown frames by itself."""
    made = session(pattern, processor)
    for pixels, moment in frames:
        made.push(pixels, moment)
    return made


def refused(interrupt: Interrupt) -> FrameSource:
    """The opening of a source that is no longer there."""
    raise ConfigError("SOURCE: it is gone")


@contextmanager
def shown(
    sides: list[Side], source: FrameSource, opening: Callable[[Interrupt], FrameSource] = refused, **more: Any
) -> Iterator[SideBySide]:
    """A source that is being shown to the sides; closed afterwards."""
    made = SideBySide(sides, source, opening, **more)
    made.start()
    try:
        yield made
    finally:
        made.close()
