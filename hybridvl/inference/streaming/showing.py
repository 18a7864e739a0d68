"""A source shown to a session frame by frame, with texts and questions at their times; what happens comes as events."""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from hybridvl.data.sources import FrameSource, Prefetcher, TimedFrame
from hybridvl.inference.replies import ReplyPiece
from hybridvl.inference.streaming.feeding import encode_steps, wait_for_device
from hybridvl.inference.streaming.session import StreamingSession
from hybridvl.inference.streaming.steps import ReadyFrame
from hybridvl.layers.errors import ConfigError
from hybridvl.models.sampling import Sampling

STAGES = ("wait", "prepare", "vision", "layers")
"""Where the time of a frame goes: waiting for it, resizing and cutting it (in a thread, meanwhile), the vision tower,
the language model's layers."""


BEFORE = -1.0
"""The time of a cue that comes before the first frame."""


@dataclass(frozen=True)
class Cue:
    """Something that is said to a stream: a question, or a text that stays in it.

    time: seconds of the source; it comes after all frames up to then. BEFORE is ahead of the first frame, None after
    the last. asks: whether it is a question.
    """

    time: float | None
    text: str
    asks: bool = True


@dataclass(frozen=True, kw_only=True)
class Showing:
    """How a source is shown.

    Attributes:
        max_new_tokens: longest reply.
        sampling: how replies are chosen, see `StreamingSession.ask`.
        stops: texts that end a reply.
        queue: frames that are made ready ahead.
        drop: "never" or "oldest", see `Prefetcher`.
        realtime: show a file no faster than it plays.
        most_frames: end after so many; None: with the source.
    """

    max_new_tokens: int = 64
    sampling: Sampling | None = None
    stops: Sequence[str] = ()
    queue: int = 4
    drop: str = "never"
    realtime: bool = False
    most_frames: int | None = None


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a source has been shown.

    Attributes:
        time: of the last frame, in seconds of the source.
        frames: shown so far.
        tokens: of the stream so far.
        dropped: frames that gave way to newer ones.
        reconnects: how often the source was lost and found again.
        seconds: since the beginning, questions not counted.
        stages: seconds of all frames in each of STAGES.
        state_bytes: of the model's state.
    """

    time: float = 0.0
    frames: int = 0
    tokens: int = 0
    dropped: int = 0
    reconnects: int = 0
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    state_bytes: int = 0

    @property
    def rate(self) -> float:
        """Frames a second from end to end: opened source to model's state, decoding and preparing included."""
        return self.frames / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Reply:
    """The next piece of a reply.

    cue: the question. progress: when it was asked. piece: of the reply. seconds: since it was asked. late: whether the
    stream ended before the time of the question, which was asked then.
    """

    cue: Cue
    progress: Progress
    piece: ReplyPiece
    seconds: float
    late: bool = False


@dataclass(frozen=True)
class Unsaid:
    """A text whose time did not come: the stream ended at `time`, and is without it."""

    cue: Cue
    time: float


Event = Progress | Reply | Unsaid


@dataclass(frozen=True)
class _Prepared:
    time: float
    frame: ReadyFrame
    seconds: float


class Show:
    """A source that is being shown to a session; iterate it once.

    It gives a Progress after every frame, and the pieces of replies when they are asked for. The times of the source go
    on after those that the session has seen. However the loop is left, the source is closed, and the session has the
    frames that were shown, each whole.

    Args:
        session: what it is shown to.
        source: the frames.
        cues: what is said, and when.
        showing: how.

    Raises:
        ConfigError: in the loop: of the source or a frame; what came before it has been shown.
    """

    def __init__(
        self, session: StreamingSession, source: FrameSource, cues: Sequence[Cue] = (), showing: Showing | None = None
    ) -> None:
        self.session, self.source, self.showing = session, source, showing or Showing()
        timed = sorted((cue for cue in cues if cue.time is not None), key=lambda cue: cue.time or 0.0)
        self._cues = deque([*timed, *(cue for cue in cues if cue.time is None)])
        self._stages = dict.fromkeys(STAGES, 0.0)
        self._frames, self._time, self._answering = 0, 0.0, 0.0
        self._after = session.after_last
        options = self.showing
        self._ahead = Prefetcher(source, self._prepared, options.queue, options.drop, options.realtime)
        self._begun = time.perf_counter()

    def __iter__(self) -> Generator[Event]:
        lost: ConfigError | None = None
        with self._ahead:
            begin = time.perf_counter()
            try:
                for prepared in self._ahead:
                    self._stages["wait"] += time.perf_counter() - begin
                    yield from self._due(prepared.time)
                    self._push(prepared)
                    yield self.progress
                    if self._frames == self.showing.most_frames:
                        break
                    begin = time.perf_counter()
            except ConfigError as error:
                if not self.session.whole:
                    raise
                lost = error  # after what is still to be asked about the frames that came
            while self._cues:
                yield from self._say(self._cues.popleft(), ended=True)
        if lost is not None:
            raise lost

    @property
    def progress(self) -> Progress:
        """How far it is."""
        return Progress(
            time=self._time,
            frames=self._frames,
            tokens=self.session.timeline.tokens,
            dropped=self._ahead.dropped,
            reconnects=self.source.reconnects,
            seconds=time.perf_counter() - self._begun - self._answering,
            stages=dict(self._stages),
            state_bytes=self.session.state_bytes,
        )

    def _prepared(self, frame: TimedFrame) -> _Prepared:
        """In the thread that reads ahead."""
        begin = time.perf_counter()
        ready = self.session.steps.ready(frame.pixels, f"{self.source.name}: frame at {frame.time:g} s")
        return _Prepared(frame.time, ready, time.perf_counter() - begin)

    def _push(self, prepared: _Prepared) -> None:
        self._stages["prepare"] += prepared.seconds
        with undivided():
            for step in self.session.steps.take(prepared.frame, prepared.time + self._after):
                begin = time.perf_counter()
                (features,) = encode_steps(self.session.runner, [step])
                wait_for_device(self.session.model)
                between = time.perf_counter()
                self.session.push_features(features, step)
                wait_for_device(self.session.model)
                self._stages["vision"] += between - begin
                self._stages["layers"] += time.perf_counter() - between
            self._frames, self._time = self._frames + 1, prepared.time

    def _due(self, before: float) -> Iterator[Event]:
        """What is to be said before a frame of this time."""
        while self._cues and self._cues[0].time is not None and self._cues[0].time < before:
            yield from self._say(self._cues.popleft(), ended=False)

    def _say(self, cue: Cue, ended: bool) -> Iterator[Event]:
        late = ended and cue.time is not None and cue.time > self._time
        if not cue.asks:
            if late:
                yield Unsaid(cue, self._time)
            else:
                self.session.say(cue.text)
            return
        showing, progress, begin = self.showing, self.progress, time.perf_counter()
        for piece in self.session.ask(cue.text, showing.max_new_tokens, showing.sampling, showing.stops):
            seconds = time.perf_counter() - begin
            yield Reply(cue, progress, piece, seconds, late)
        self._answering += time.perf_counter() - begin


@contextmanager
def undivided() -> Iterator[None]:
    """Ctrl-C and SIGTERM, where they are handled, come after the block: when a frame is in all layers of the state."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handled = {number: handler for number, handler in before.items() if callable(handler)}
    if threading.current_thread() is not threading.main_thread():
        handled = {}
    came: list[tuple[int, FrameType | None]] = []
    holding = True

    def hold(number: int, frame: FrameType | None) -> None:
        if holding:
            came.append((number, frame))
        else:  # another one has come while handlers were put back
            handled[signal.Signals(number)](number, frame)

    try:
        for number in handled:
            signal.signal(number, hold)
        yield
    finally:
        holding = False
        for number, handler in handled.items():
            signal.signal(number, handler)
        if came:
            handled[signal.Signals(came[0][0])](*came[0])
