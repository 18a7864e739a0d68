"""FFmpeg's calls that wait for a network, ended from another thread."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

# While FFmpeg waits it asks ten times a second whether to go on. PyAV answers by the clock, and by nothing else: not
# until a timeout is over. So the clock that PyAV sees is put forward for the one thread that is to end its wait.


class _Clock(threading.local):
    """Stands for the module `time` within PyAV; each thread may have a clock of its own in its attribute."""

    # PyAV calls it without a frame of Python, where a signal's handler could not run: so must all that stands for it.
    monotonic = staticmethod(time.monotonic)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


_clock = _Clock()
_installing = threading.Lock()


class Interrupt:
    """Ends the waiting calls of FFmpeg that are made within `calls`, at once and ever after.

    Attributes:
        event: whether it is set.
    """

    def __init__(self) -> None:
        self.event = threading.Event()
        self._lock = threading.Lock()
        self._thread: dict[str, Any] | None = None

    @contextmanager
    def calls(self) -> Iterator[None]:
        """A block whose calls of FFmpeg fail within a tenth of a second after `set`; of one thread at a time.

        Calls must have a timeout, or else FFmpeg does not ask.
        """
        _install()
        with self._lock:
            self._thread = _clock.__dict__
            if self.event.is_set():
                self._put_forward()
        try:
            yield
        finally:
            with self._lock:
                thread, self._thread = self._thread, None
                if thread is not None:
                    thread.pop("monotonic", None)

    def set(self) -> None:
        """End what waits; may be called by any thread."""
        with self._lock:
            self.event.set()
            self._put_forward()

    def _put_forward(self) -> None:
        if self._thread is not None:
            # Every look at the clock is later than any timeout after the one before.
            self._thread["monotonic"] = itertools.count(1e300, 1e300).__next__


def _install() -> None:
    core: Any = import_module("av.container.core")
    # A PyAV without this name would still end its calls, when their timeout is over.
    with _installing:
        if getattr(core, "time", None) is time:
            core.time = _clock
