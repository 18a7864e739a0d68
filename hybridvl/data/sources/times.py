"""Times of frames: made to begin at 0 and to go on, thinned out to a rate, and waited for."""

from __future__ import annotations

import threading
import time

LEAP = 10.0
"""A step of a live stream's own times that is longer than the time that passed by so many seconds is a new clock."""

LOOK_UP = 0.2
"""Seconds after which what waits in the main thread looks up: Python overlooks a Ctrl-C just before a wait begins."""

_BACK = 1.0  # Own times that step back further than this, in seconds, are those of a new clock.
_LEAST = 0.001  # What is shown out of turn comes this much after the frame before, in seconds.
_ROUNDING = 0.001  # Many formats keep times in whole milliseconds, so a difference of two is wrong by up to one.


class Clock:
    """The wall clock in seconds; tests have their own."""

    def now(self) -> float:
        """Seconds from some fixed moment."""
        return time.monotonic()

    def wait(self, seconds: float, stop: threading.Event) -> bool:
        """Wait so long, or until `stop` is set; whether it is."""
        return stop.wait(max(seconds, 0.0))


class Timeline:
    """Times that begin at 0 and always go on, out of a stream's own times, which need not do either.

    A frame that is out of turn by up to a second comes right after the one before it. Own times that step back further
    are of a new clock (streams that were put one after another, a sender that began anew): its first frame comes one
    step after the last of the old one.

    Args:
        step: seconds from one frame to the next, where the own times do not say.
    """

    def __init__(self, step: float) -> None:
        self._step = step
        self._last: float | None = None
        self._offset = 0.0

    def place(self, own: float | None, passed: float | None = None) -> float:
        """The time of the next frame in seconds, later than all before.

        Args:
            own: the frame's own time in seconds; None if it has none.
            passed: seconds by the wall clock since the frame before, of a live stream. An own time that is 10 seconds
                beyond it is of a new clock, too.
        """
        if self._last is None:
            self._offset = -(own or 0.0)
            self._last = 0.0
            return 0.0
        if own is None:
            self._last += self._step
            return self._last
        step = own + self._offset - self._last
        if step < -_BACK or (passed is not None and step > max(passed, 0.0) + LEAP):
            return self.resume(own, self._step if passed is None else passed)
        if step > 0:
            self._step = min(max(step, _LEAST), _BACK)
        self._last += max(step, _LEAST)
        return self._last

    def resume(self, own: float | None, passed: float) -> float:
        """The time of the first frame after a break, so many seconds after the last one; own times begin anew."""
        if self._last is None:
            return self.place(own)
        self._last += max(passed, _LEAST)
        self._offset = self._last - (own or 0.0)
        return self._last


class Sampler:
    """Chooses frames at a rate by their times: of each period of 1 / fps the first frame, periods counted from 0.

    A frame less than half a period after the one chosen last is passed over, so that an uneven stream is not shown in
    pairs. Times may be wrong by a millisecond (or a quarter of a period, if that is less), as they are rounded in many
    formats: a frame that is too early by no more belongs to the next period.

    Args:
        fps: frames a second; None chooses every frame.
    """

    def __init__(self, fps: float | None) -> None:
        self._fps = fps
        self._period = -1
        self._last = float("-inf")

    def takes(self, time: float) -> bool:
        """Whether the frame at this time in seconds is chosen; times must not step back."""
        if self._fps is None:
            return True
        rounding = min(_ROUNDING, 0.25 / self._fps) + 1e-9
        period = int((time + rounding) * self._fps)
        if period <= self._period or time - self._last < 0.5 / self._fps - rounding:
            return False
        self._period, self._last = period, time
        return True
