"""How a stream goes, on the terminal and in a log: rates, time of each stage, state, questions and replies."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table

from hybridvl.inference.streaming.showing import BEFORE, STAGES, Progress, Reply

_REFRESH = 4  # a second
_MOMENTS = {BEFORE: "start", None: "end"}  # as --ask has them


def summary(progress: Progress) -> str:
    """How a stream went, in one line."""
    dropped = f", {progress.dropped:,} dropped" if progress.dropped else ""
    lost = f", {progress.reconnects} reconnects" if progress.reconnects else ""
    return (
        f"{progress.frames:,} frames to {progress.time:.1f} s{dropped}{lost}, {progress.rate:,.1f} frames/s end to end "
        f"({stages(progress)}), {progress.tokens:,} tokens, state {progress.state_bytes:,} bytes"
    )


def stages(progress: Progress) -> str:
    """Mean time of a frame in each stage."""
    frames = max(progress.frames, 1)
    return ", ".join(f"{name} {1000 * progress.stages.get(name, 0.0) / frames:.1f}" for name in STAGES) + " ms"


class StreamView:
    """A live table on standard error where that is a terminal, nothing elsewhere; it makes room for replies."""

    def __init__(self, quiet: bool) -> None:
        console = Console(stderr=True) if sys.stderr is not None else None
        shown = console is not None and console.is_terminal and not quiet
        self._live = _live(console) if shown else None
        self._quiet = quiet
        self._replying = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def progress(self, progress: Progress) -> None:
        """Show how far the stream is."""
        if self._live is not None:
            self._live.start()
            self._live.update(_table(progress))

    def begins(self, reply: Reply) -> bool:
        """Make room for a piece of a reply; whether it is the first one."""
        if self._live is not None:
            self._live.stop()
        first, self._replying = not self._replying, not reply.piece.finish_reason
        return first

    def note(self, text: str) -> None:
        """Something that the user should know."""
        if not self._quiet and sys.stderr is not None:
            print(text, file=sys.stderr)


class StreamLog:
    """A file of JSON objects, one a line: replies when they are whole, and at last how the stream went.

    Args:
        path: of the file, which is appended to; None keeps no log.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._text = ""
        self._first: float | None = None

    def reply(self, reply: Reply) -> None:
        """Take a piece; whole replies are written."""
        self._first = reply.seconds if self._first is None else self._first
        self._text += reply.piece.text
        if not reply.piece.finish_reason:
            return
        rates, progress = reply.piece.rates, reply.progress
        self._write(
            {
                "event": "reply",
                "asked": _MOMENTS.get(reply.cue.time, reply.cue.time),
                "time": progress.time,
                "late": reply.late,
                "frames": progress.frames,
                "tokens": progress.tokens,
                "question": reply.cue.text,
                "reply": self._text,
                "finish_reason": reply.piece.finish_reason,
                "first_seconds": self._first,
                "seconds": reply.seconds,
                "question_tokens": rates.prompt_tokens,
                "new_tokens": rates.new_tokens,
                "tokens_per_second": rates.decode_rate,
                "state_bytes": rates.state_bytes,
            }
        )
        self._text, self._first = "", None

    def end(self, progress: Progress) -> None:
        """The stream has ended, in whichever way."""
        per_frame = {name: progress.stages.get(name, 0.0) / max(progress.frames, 1) for name in STAGES}
        self._write(
            {
                "event": "end",
                "time": progress.time,
                "frames": progress.frames,
                "tokens": progress.tokens,
                "dropped": progress.dropped,
                "reconnects": progress.reconnects,
                "seconds": progress.seconds,
                "frames_per_second": progress.rate,
                "seconds_per_frame": per_frame,
                "state_bytes": progress.state_bytes,
            }
        )

    def _write(self, record: dict[str, Any]) -> None:
        if self._path is None:
            return
        file: TextIO
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _live(console: Console | None) -> Live:
    # What else is printed meanwhile may go elsewhere, as into a pipe.
    return Live(
        console=console, refresh_per_second=_REFRESH, transient=True, redirect_stdout=False, redirect_stderr=False
    )


def _table(progress: Progress) -> Table:
    table = Table(show_header=False)
    rows = {
        "time": f"{progress.time:.1f} s",
        "frames": f"{progress.frames:,}  ({progress.rate:,.1f} a second, end to end)",
        "dropped": f"{progress.dropped:,}",
        "reconnects": f"{progress.reconnects}",
        "a frame": stages(progress),
        "context": f"{progress.tokens:,} tokens",
        "state": f"{progress.state_bytes:,} bytes",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
