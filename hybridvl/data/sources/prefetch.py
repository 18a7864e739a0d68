"""Frames read and prepared by a thread ahead of whoever takes them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from hybridvl.data.checks import require_whole
from hybridvl.data.sources.frames import FrameSource, TimedFrame
from hybridvl.data.sources.times import LOOK_UP, Clock
from hybridvl.layers.errors import ConfigError

Prepared = TypeVar("Prepared")
DROPS = ("never", "oldest")


class Prefetcher(Generic[Prepared]):
    """A thread that reads a source and prepares its frames, and a short queue of what is not yet taken.

    Iterating starts the thread, and leaving the loop, however it is left, ends it and closes the source. A mistake in
    the source or in `prepare` is raised in the loop, after the frames that came before it. `prepare` should take less
    time than the source leaves between two frames: what waits before it is not counted.

    Args:
        source: the frames; closed with the prefetcher if it is a FrameSource.
        prepare: what is made of every frame, in the thread; None leaves it as it is.
        size: longest queue.
        drop: "never": with a full queue the source waits, as a file can. "oldest": what has waited longest gives way
            to what is new, as a camera goes on; it is counted.
        realtime: release frames at their own times by the wall clock, counted from the first, as a camera would. Live
            sources are not held back.
        clock: the wall clock.

    Attributes:
        released: frames that were put into the queue.

    Raises:
        ConfigError: size or drop is none.
    """

    def __init__(
        self,
        source: Iterable[TimedFrame],
        prepare: Callable[[TimedFrame], Prepared] | None = None,
        size: int = 4,
        drop: str = "never",
        realtime: bool = False,
        clock: Clock | None = None,
    ) -> None:
        require_whole("prefetch.size", size)
        if drop not in DROPS:
            raise ConfigError(f"prefetch.drop: {drop!r:.80}; expected one of {', '.join(DROPS)}")
        self.released = 0
        self._source = source
        self._prepare: Callable[[TimedFrame], Any] = prepare or _as_it_is
        self._size = size
        self._drops = drop == "oldest"
        self._clock = clock or Clock()
        self._paced = realtime and not (isinstance(source, FrameSource) and source.live)
        self._queue: deque[Prepared] = deque()
        self._dropped = 0
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._outcome = _Outcome()
        self._ended = False
        self._iterated = False
        self._thread: threading.Thread | None = None

    @property
    def dropped(self) -> int:
        """Frames that gave way to newer ones so far."""
        with self._changed:
            return self._dropped

    def __iter__(self) -> Iterator[Prepared]:
        """What `prepare` made of the frames, in their order.

        Raises:
            RuntimeError: it was iterated or closed already.
        """
        if self._iterated or self._closing.is_set():
            raise RuntimeError("a prefetcher is read once; make a new one of a source that is opened again")
        self._iterated = True
        return self._taken()

    def start(self) -> None:
        """Read ahead from now on, and not from the first frame that is asked for; to be closed, then."""
        if self._thread is None and not self._closing.is_set():
            # A thread that no one waits for at the end of the process, where a source may be waiting for ever.
            self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # There are too many already.
                self._thread = None
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the thread and close the source; a loop that waits for a frame ends. Any thread may call it again."""
        with self._changed:
            self._closing.set()
            self._queue.clear()
            self._changed.notify_all()
        self._close_source()
        if self._thread is not None and self._thread is not threading.current_thread():
            with self._changed:
                # Not by joining alone: Ctrl-C may have come while the thread was started, when it cannot be joined yet.
                self._changed.wait_for(lambda: self._ended)
            self._thread.join()

    def _taken(self) -> Iterator[Prepared]:
        try:
            self.start()
            while True:
                with self._changed:
                    while not self._changed.wait_for(self._is_due, LOOK_UP):
                        pass
                    if not self._queue:
                        break
                    prepared = self._queue.popleft()
                    self._changed.notify_all()
                yield prepared
            if not self._closing.is_set():
                self._outcome.tell()
        finally:
            self.close()

    def _is_due(self) -> bool:
        """Whether a loop that waits need not wait any longer."""
        return bool(self._queue) or self._ended or self._closing.is_set()

    def _run(self) -> None:
        with self._outcome:
            try:
                self._fill()
            finally:
                self._close_source()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _fill(self) -> None:
        start: float | None = None
        for frame in self._source:
            if self._closing.is_set():
                return
            prepared = self._prepare(frame)
            if self._paced:
                now = self._clock.now()
                start = now - frame.time if start is None else start
                if start + frame.time > now and self._clock.wait(start + frame.time - now, self._closing):
                    return
            if not self._put(prepared):
                return

    def _put(self, prepared: Prepared) -> bool:
        """Put it into the queue, once there is room; whether it was before the end."""
        with self._changed:
            while len(self._queue) >= self._size and not self._closing.is_set():
                if self._drops:
                    self._queue.popleft()
                    self._dropped += 1
                else:
                    self._changed.wait()
            if self._closing.is_set():
                return False
            self._queue.append(prepared)
            self.released += 1
            self._changed.notify_all()
            return True

    def _close_source(self) -> None:
        if isinstance(self._source, FrameSource):
            self._source.close()


class _Outcome:
    """A block of a thread whose exception, of whatever kind, is raised in another."""

    def __init__(self) -> None:
        self._error: BaseException | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._error = error
        return True

    def tell(self) -> None:
        """Raise the block's exception, if there was one."""
        error, self._error = self._error, None
        if error is not None:
            raise error


def _as_it_is(frame: TimedFrame) -> TimedFrame:
    return frame
