"""A source shown to several sessions at once by a thread, each of them timed by itself, and asked while it goes on."""

from __future__ import annotations

import dataclasses
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hybridvl.data.sources import FrameSource, Prefetcher, TimedFrame
from hybridvl.data.sources.interrupts import Interrupt
from hybridvl.inference.replies import ReplyPiece
from hybridvl.inference.streaming.showing import Showing
from hybridvl.inference.streaming.sides import ShownSide, Side, SideView
from hybridvl.inference.streaming.steps import ReadyFrame
from hybridvl.layers.errors import ConfigError
from hybridvl.resident import resident_bytes


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """How far a stream is, as of its last frame.

    Attributes:
        number: grows with every view.
        status: "waiting" before the first frame, "playing", "paused" or "ended".
        error: what ended it, if that was a mistake; else "".
        time: of the last frame, in seconds of the stream; None before the first one.
        picture: (H, W, 3) uint8, the last frame; None before the first one.
        dropped: frames that gave way to newer ones.
        resident: bytes that the whole process holds; None where the system does not tell.
        sides: in the order that they were given.
    """

    number: int = 0
    status: str = "waiting"
    error: str = ""
    time: float | None = None
    picture: NDArray[np.uint8] | None = None
    dropped: int = 0
    resident: int | None = None
    sides: tuple[SideView, ...] = ()


@dataclass(frozen=True)
class Answer:
    """The next piece of a reply.

    side: number of the session that replies. time: of the last frame that it had seen when it was asked, in seconds;
    None if there was none. piece: of the reply.
    """

    side: int
    time: float | None
    piece: ReplyPiece


@dataclass(frozen=True)
class _Prepared:
    time: float
    pixels: NDArray[np.uint8]
    ready: tuple[ReadyFrame, ...]  # for each side


class SideBySide:
    """A source that a thread shows to sessions, frame by frame: each frame to all of them, one after another.

    What a session's frame takes is measured by itself; frames during which a reply was written are shown but not
    measured, as they share the processor with it. The methods may be called by any thread.

    Args:
        sides: the sessions; the first one's times are those of the stream.
        source: the frames; closed at the end.
        opening: opens the source again, for a stream that begins anew; setting what it is given ends its waiting.
        showing: how, and how replies are written; `most_frames` is not looked at.
        loop: whether a source that has ended begins again; the stream's time goes on.
    """

    def __init__(
        self,
        sides: Sequence[Side],
        source: FrameSource,
        opening: Callable[[Interrupt], FrameSource],
        showing: Showing | None = None,
        loop: bool = False,
    ) -> None:
        self._sides = [ShownSide(side) for side in sides]
        self._source, self._opening = source, opening
        self._showing, self._loop = showing or Showing(), loop
        self._changed = threading.Condition()
        self._working = threading.Lock()  # held while a frame is on its way into the states
        self._asking, self._replying, self._shown_frames = 0, 0, 0
        self._paused = self._anew = self._closing = False
        self._origin: float | None = None
        self._after = 0.0
        self._opens = Interrupt()  # of the opening that is under way, if one is
        self._ahead: Prefetcher[_Prepared] | None = None
        self._view = View(sides=self._views())
        self._thread = threading.Thread(target=self._run, name="side by side", daemon=True)

    @property
    def view(self) -> View:
        """How far it is; always at once."""
        return self._view

    def start(self) -> None:
        """Begin to show; to be closed, then."""
        self._thread.start()

    def close(self) -> None:
        """End after the frame that is being shown, and close the source."""
        with self._changed:
            self._closing = True
        self._give_up_source()
        if self._thread.ident is not None:
            self._thread.join()
        self._source.close()  # where it was never begun

    def pause(self) -> None:
        """Show no more frames for now; files wait, live sources go on without being seen."""
        with self._between_frames():
            self._set_paused(True)

    def go_on(self) -> None:
        """Show frames again."""
        self._set_paused(False)

    def begin_anew(self) -> None:
        """Forget what was shown, and begin with the source opened again."""
        with self._changed:
            self._anew, self._paused = True, False
        self._give_up_source()

    def ask(self, question: str) -> Iterator[Answer]:
        """The replies of the sides that answer, one after another, all of them about this moment.

        The stream stands still until its states are copied, no longer. ConfigErrors are raised here.
        """
        showing, replies = self._showing, []
        with self._between_frames():
            for number, shown in enumerate(self._sides):
                session = shown.side.session
                if shown.side.answers:
                    pieces = session.ask(question, showing.max_new_tokens, showing.sampling, showing.stops)
                    replies.append((number, session.timeline.time, pieces))
        return self._answers(replies)

    def _give_up_source(self) -> None:
        """End the thread's waits, whatever they are for."""
        with self._changed:
            self._changed.notify_all()
            opens, ahead = self._opens, self._ahead
        opens.set()
        if ahead is not None:
            ahead.close()

    def _answers(self, replies: Sequence[tuple[int, float | None, Iterator[ReplyPiece]]]) -> Iterator[Answer]:
        with self._changed:
            self._replying += 1
        try:
            for number, moment, pieces in replies:
                for piece in pieces:
                    if self._closing:
                        return
                    yield Answer(number, moment, piece)
        finally:
            with self._changed:
                self._replying -= 1

    @contextmanager
    def _between_frames(self) -> Iterator[None]:
        with self._changed:
            self._asking += 1
        try:
            with self._working:
                yield
        finally:
            with self._changed:
                self._asking -= 1
                self._changed.notify_all()

    def _set_paused(self, paused: bool) -> None:
        with self._changed:
            self._paused = paused
            self._origin = None  # a frame that waits comes at once, and the others as long after it as they should
            if self._view.status != "ended":
                going = "waiting" if self._view.time is None else "playing"
                self._publish(dataclasses.replace(self._view, status="paused" if paused else going))
            self._changed.notify_all()

    def _run(self) -> None:
        self._play_and_wait(self._source)
        while not self._closing:
            self._play_and_wait(None)

    def _play_and_wait(self, source: FrameSource | None) -> None:
        """Show a source, by default the one that is opened again, and wait at its end unless it is to begin again."""
        count, error = 0, ""
        try:
            count = self._play(self._opened_again() if source is None else source)
        except ConfigError as mistake:
            error = str(mistake)
        except Exception as fault:  # noqa: BLE001 - whatever it is, a thread would keep it to itself
            # Whoever looks at the stream should know, and may begin anew; where it was is told to who started it.
            error = f"{type(fault).__name__}: {fault}"
            traceback.print_exc()
        with self._changed:
            if not (self._closing or self._anew) and (error or not self._loop or not count):
                self._publish(dataclasses.replace(self._view, status="ended", error=error))
                self._changed.wait_for(lambda: self._closing or self._anew)

    def _opened_again(self) -> FrameSource:
        opens = Interrupt()
        with self._changed:
            anew, self._anew = self._anew, False
            self._opens = opens
            if self._closing:
                opens.set()
        if anew:
            with self._working:
                for side in self._sides:
                    side.begin_anew()
            self._after = 0.0
            with self._changed:
                self._publish(View(sides=self._views()))
        else:
            self._after = self._sides[0].side.session.after_last
        return self._opening(opens)

    def _play(self, source: FrameSource) -> int:
        """Show a source up to its end, or until something else is wanted; the number of frames."""
        showing = self._showing
        ahead = Prefetcher(source, self._prepared, showing.queue, showing.drop)
        count, self._origin = 0, None
        with ahead:
            with self._changed:
                if self._closing or self._anew:
                    return 0
                self._ahead, frames = ahead, iter(ahead)
            for prepared in frames:
                if not self._shown(prepared, showing.realtime and not source.live, ahead.dropped):
                    break
                count += 1
        return count

    def _shown(self, prepared: _Prepared, paced: bool, dropped: int) -> bool:
        """Show a frame once it may be; False if it is not to be."""
        while self._may_show(prepared.time, paced):
            with self._working:
                if not self._paused:  # since a moment ago
                    self._show(prepared, dropped)
                    return True
        return False

    def _may_show(self, moment: float, paced: bool) -> bool:
        """Wait until a frame may be shown; False if it is not to be."""
        with self._changed:
            while not (self._closing or self._anew):
                now = time.monotonic()
                if self._origin is None:
                    self._origin = now - moment
                early = self._origin + moment - now if paced else 0.0
                if not self._paused and not self._asking and early <= 0:
                    return True
                self._changed.wait(None if self._paused or early <= 0 else early)
        return False

    def _prepared(self, frame: TimedFrame) -> _Prepared:
        """In the thread that reads ahead; once for all sides that want the same."""
        made: dict[tuple[int, tuple[float, float]], ReadyFrame] = {}
        wanted = []
        for side in self._sides:
            steps = side.side.session.steps
            key = id(steps.images), steps.limits
            if key not in made:
                made[key] = steps.ready(frame.pixels, f"{self._source.name}: frame at {frame.time:g} s")
            wanted.append(made[key])
        return _Prepared(frame.time, frame.pixels, tuple(wanted))

    def _show(self, prepared: _Prepared, dropped: int) -> None:
        moment, alone = prepared.time + self._after, not self._replying
        turns = list(zip(self._sides, prepared.ready, strict=True))
        # Who comes first shares the processor with the thread that makes the next frame ready: they take turns.
        self._shown_frames += 1
        for side, ready in turns if self._shown_frames % 2 else reversed(turns):
            side.show(ready, moment)
        if alone and not self._replying:
            for side in self._sides:
                side.note(moment)
        with self._changed:
            self._publish(
                View(
                    status="playing",
                    time=moment,
                    picture=prepared.pixels,
                    dropped=dropped,
                    resident=resident_bytes(),
                    sides=self._views(),
                )
            )

    def _views(self) -> tuple[SideView, ...]:
        return tuple(side.view for side in self._sides)

    def _publish(self, view: View) -> None:
        self._view = dataclasses.replace(view, number=self._view.number + 1)
