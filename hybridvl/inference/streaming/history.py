"""How a stream went so far, in bounded space: the longer it lasts, the more frames a point stands for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from hybridvl.data.checks import require_whole
from hybridvl.layers.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Point:
    """What the frames around a moment of a stream took.

    Attributes:
        time: of the last of them, in seconds of the stream.
        tokens: of the stream up to there.
        milliseconds: of the model's own work for one frame, the mean of them.
        state_bytes: of the model's state then.
    """

    time: float
    tokens: int
    milliseconds: float
    state_bytes: int


class History:
    """Points of a stream without end, at most so many: when they are too many, every two become one.

    Args:
        most: points that are kept, an even number.

    Attributes:
        stride: frames that a point stands for.
    """

    def __init__(self, most: int = 400) -> None:
        require_whole("most", most)
        if most % 2:
            raise ConfigError(f"most: {most}; expected an even number of points")
        self.stride = 1
        self._most = most
        self._points: list[Point] = []
        self._last: Point | None = None
        self._count, self._sum = 0, 0.0

    def add(self, frame: Point) -> None:
        """Take the point of one frame, later than all others."""
        self._last = frame
        self._count, self._sum = self._count + 1, self._sum + frame.milliseconds
        if self._count < self.stride:
            return
        self._points.append(self._waiting(frame))
        self._count, self._sum = 0, 0.0
        if len(self._points) == self._most:
            pairs = zip(self._points[::2], self._points[1::2], strict=True)
            means = [(one.milliseconds + two.milliseconds) / 2 for one, two in pairs]
            self._points = [
                dataclasses.replace(point, milliseconds=mean)
                for point, mean in zip(self._points[1::2], means, strict=True)
            ]
            self.stride *= 2

    @property
    def points(self) -> tuple[Point, ...]:
        """In their order; the last one is of the last frame, and may stand for fewer than the others."""
        rest = () if self._last is None or not self._count else (self._waiting(self._last),)
        return (*self._points, *rest)

    def _waiting(self, last: Point) -> Point:
        return dataclasses.replace(last, milliseconds=self._sum / self._count)
