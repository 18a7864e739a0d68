"""Sessions that see the same frames side by side, and what the frames of each took."""

from __future__ import annotations

import statistics
import time
from collections import deque
from dataclasses import dataclass

from hybridvl.inference.streaming.feeding import wait_for_device
from hybridvl.inference.streaming.history import History, Point
from hybridvl.inference.streaming.session import StreamingSession
from hybridvl.inference.streaming.steps import ReadyFrame

_RECENT = 16  # frames whose median time is shown as the present one


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the sessions that see the same frames.

    Attributes:
        name: what it is called.
        session: with one frame in a step, and nothing shown to it yet.
        answers: whether questions are put to it.
        most_tokens: it is shown no more once its stream has so many; None: for ever.
    """

    name: str
    session: StreamingSession
    answers: bool = True
    most_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class SideView:
    """How far one of them is.

    Attributes:
        name: what it is called.
        frames: shown so far.
        tokens: of its stream.
        milliseconds: of its own work for a frame, the median of the last ones; None before the first.
        state_bytes: of its state.
        points: how it went.
        stopped: whether it has come to its most tokens.
    """

    name: str
    frames: int
    tokens: int
    milliseconds: float | None
    state_bytes: int
    points: tuple[Point, ...]
    stopped: bool


class ShownSide:
    """A side, and what its frames took; used by one thread at a time.

    Attributes:
        side: as it was given.
    """

    _frames: int
    _took: float  # milliseconds of the last frame; 0 where it was not shown

    def __init__(self, side: Side) -> None:
        self.side = side
        self._clear()

    def begin_anew(self) -> None:
        """Forget what was shown."""
        self.side.session.reset()
        self._clear()

    def show(self, ready: ReadyFrame, moment: float) -> None:
        """Give a frame to the session, unless it has come to its most tokens."""
        session, begin = self.side.session, time.perf_counter()
        self._took = 0.0
        if self._stopped:
            return
        for step in session.steps.take(ready, moment):
            session.push_step(step)
        wait_for_device(session.model)
        self._frames, self._took = self._frames + 1, 1000 * (time.perf_counter() - begin)

    def note(self, moment: float) -> None:
        """Keep what the last frame took."""
        if not self._took:
            return
        self._recent.append(self._took)
        session = self.side.session
        self._history.add(
            Point(
                time=moment,
                tokens=session.timeline.tokens,
                milliseconds=self._took,
                state_bytes=session.state_bytes,
            )
        )

    @property
    def view(self) -> SideView:
        """How far it is."""
        session, recent = self.side.session, self._recent
        return SideView(
            name=self.side.name,
            frames=self._frames,
            tokens=session.timeline.tokens,
            milliseconds=statistics.median(recent) if recent else None,
            state_bytes=session.state_bytes,
            points=self._history.points,
            stopped=self._stopped,
        )

    def _clear(self) -> None:
        self._history = History()
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._frames, self._took = 0, 0.0

    @property
    def _stopped(self) -> bool:
        most = self.side.most_tokens
        return most is not None and self.side.session.timeline.tokens >= most
