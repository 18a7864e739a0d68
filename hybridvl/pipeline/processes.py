"""A stage as a process of its own, which gets the signals that this one gets and does not outlive it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hybridvl.data.loader import end_with_parent

_HANDED_ON = (signal.SIGINT, signal.SIGTERM)


class Ended(NamedTuple):
    """How a process ended.

    Attributes:
        status: its exit status; the negative number of the signal that ended it.
        signal: the first signal that was handed on to it, if any.
    """

    status: int
    signal: int | None


def run_process(command: Sequence[str]) -> Ended:
    """Run a command to its end, with this process's output.

    SIGINT and SIGTERM are handed on once, to the command alone; the second one becomes SIGKILL. When this process is
    killed, the kernel (of Linux) kills the command.
    """
    received: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def hand_on(number: int, frame: object) -> None:
        received.append(number)
        if process is not None:
            process.send_signal(signal.SIGKILL if len(received) > 1 else number)

    sys.stdout.flush()
    with handled_by(hand_on):
        # In a session of its own, so that Ctrl-C reaches it only through this process.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        if received:
            process.send_signal(received[0])
        status = process.wait()
    return Ended(status, received[0] if received else None)


@contextlib.contextmanager
def handled_by(handler: object) -> Iterator[None]:
    """Let a function handle SIGINT and SIGTERM, those that are not ignored; in the main thread, which alone can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = {number: signal.getsignal(number) for number in _HANDED_ON}
    taken = [number for number in _HANDED_ON if earlier[number] is not signal.SIG_IGN]
    for number in taken:
        signal.signal(number, handler)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, earlier[number])
