"""Sources of frames: what all of them give, and how they are read and closed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from hybridvl.data.checks import require_rate
from hybridvl.data.sources.interrupts import Interrupt
from hybridvl.data.sources.times import Sampler

Moment = tuple[float, Callable[[], NDArray[np.uint8]]]
"""A frame before it is chosen: its time in seconds, and what makes its pixels."""


@dataclass(frozen=True, slots=True, eq=False)
class TimedFrame:
    """A frame of a source.

    Attributes:
        pixels: (H, W, 3) uint8 RGB, upright; H and W may change from one frame of a source to the next.
        time: seconds from the source's first frame, later than that of the frame before.
    """

    pixels: NDArray[np.uint8]
    time: float


class FrameSource(ABC):
    """Frames one after another, in constant memory. Read once, from one thread; closed from any.

    Args:
        name: what an error message calls it.
        fps: frames to give a second, chosen by their times as `Sampler` does; None gives every frame.
        live: see below.
        interrupt: ends what is waited for when the source is closed.

    Attributes:
        name: what an error message calls it.
        live: whether the frames come when they come, as from a camera; others wait until they are read.
        reconnects: how often a live source was lost and found again.
        damaged: frames and packets of a live source that were left out because they could not be decoded whole.

    Raises:
        ConfigError: while it is read: it is damaged, or lost for good; after all frames before.
    """

    def __init__(self, name: str, fps: float | None, live: bool = False, interrupt: Interrupt | None = None) -> None:
        if fps is not None:
            require_rate("fps", fps)
        self.name = name
        self.live = live
        self.reconnects = 0
        self.damaged = 0
        self._fps = fps
        self._interrupt = interrupt or Interrupt()
        self._closed = self._interrupt.event
        self._frames: Generator[TimedFrame, None, None] | None = None

    def __iter__(self) -> Iterator[TimedFrame]:
        """The frames; ends when the source does or is closed, which it is afterwards.

        Raises:
            RuntimeError: it was read already.
        """
        if self._frames is not None or self._closed.is_set():
            raise RuntimeError(f"{self.name} was read or closed already; open it again")
        self._frames = self._chosen()
        return self._frames

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give up the file or the connection. A thread that waits for a frame finds that the source has ended."""
        self._interrupt.set()
        if self._frames is not None:
            try:
                self._frames.close()
            except ValueError:
                return  # Another thread is within: it comes upon the end itself, and releases.
        self._release()

    @abstractmethod
    def _moments(self) -> Iterator[Moment]:
        """Every frame with its time; may end early once the source is closed."""

    @abstractmethod
    def _release(self) -> None:
        """Let go of what is open, if anything still is."""

    def _chosen(self) -> Generator[TimedFrame, None, None]:
        sampler = Sampler(self._fps)
        try:
            for time, pixels in self._moments():
                if self._closed.is_set():
                    return
                if sampler.takes(time):
                    yield TimedFrame(pixels(), time)
                    if self._closed.is_set():
                        return
        finally:
            self._release()
