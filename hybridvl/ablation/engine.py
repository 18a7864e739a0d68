"""What all engines have in common: runs, how each stands, and looking that up where others work on them."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from hybridvl.ablation.cells import Run
from hybridvl.ablation.records import Hold, RunRecord, State, attempts_in
from hybridvl.layers.errors import ConfigError
from hybridvl.pipeline.processes import handled_by

Status = Literal["waiting", "running", "elsewhere", "done", "pruned", "failed", "stopped"]

OVER: dict[State, Status] = {"done": "done", "pruned": "pruned"}
"""Of runs that nobody goes on with."""

_PAUSE = 1.0  # seconds between two looks at runs that others work on
_LAST_SIGNAL = 3  # the first is handed on, the second kills the runs, with the third nobody waits for them any more


def unwatched(engine: Engine) -> None:
    """Tell nobody."""


Watch = Callable[["Engine"], None]


@dataclass(frozen=True)
class Work:
    """What an engine is asked to do.

    Attributes:
        runs: in this order.
        folder: of the study.
        retry_failed: whether runs that have failed are tried again, once.
        watch: called with the engine some times a second, and once at the end.
        tried: how often runs had been begun when the sweep began, by their folders; None: it begins with this engine.
    """

    runs: Sequence[Run]
    folder: Path
    retry_failed: bool = False
    watch: Watch = unwatched
    tried: Mapping[Path, int] | None = None


class Engine:
    """Runs of a study and how they stand.

    Attributes:
        work: what is asked.
        runs: those of the work, and what was added.
        records: what stands on disk about each.
        statuses: of each run now; "running" here, or "elsewhere".
        reasons: why runs have failed of which the record could not be kept, by index.
        troubles: what else went wrong, for people.
        signal: the first signal that has come, if any.
        ahead: how many runs are still to come that are not known yet, as a search chooses them one after another.
        tried: how often runs had been begun when the sweep began, by their folders; only needed to try them again.

    Raises:
        ConfigError: a run was started with other settings.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self.runs: list[Run] = []
        self.records: list[RunRecord] = []
        self.statuses: list[Status] = []
        self.reasons: dict[int, str] = {}
        self.troubles: list[str] = []
        self.signal: int | None = None
        self.ahead = 0
        # Before any look at how runs stand, so that a failure in between counts as one of this sweep.
        self.tried = work.tried if work.tried is not None else attempts_in(work.folder) if work.retry_failed else {}
        for run in work.runs:
            self.add(run)

    def add(self, run: Run) -> int:
        """Take up one more run, as it stands on disk; returns its index. ConfigError for other settings' runs."""
        record = RunRecord(run.folder)
        record.check(run.key)
        state = record.state
        status = OVER.get(state, "waiting")
        if state == "failed" and not self.tries_again(record) and not Hold.is_held(record):
            status = "failed"
        self.runs.append(run)
        self.records.append(record)
        self.statuses.append(status)
        return len(self.runs) - 1

    @property
    def left(self) -> list[Run]:
        """The runs that wait."""
        return [run for run, status in zip(self.runs, self.statuses, strict=True) if status == "waiting"]

    def tries_again(self, record: RunRecord) -> bool:
        """Whether a run that has failed is begun once more: not if it has been since the sweep began."""
        return self.work.retry_failed and record.attempts <= self.tried.get(record.folder, 0)

    def reason(self, index: int) -> str:
        """Why a run ended without success, for people."""
        return self.reasons.get(index) or self.records[index].reason


@dataclass(frozen=True)
class SignalFile:
    """How many signals a sweep has had, for the processes that work for it, on whichever machine they are.

    A signal itself does not reach all of them, and some twice: a terminal sends Ctrl-C to its whole process group.
    """

    path: Path

    @classmethod
    def of_this_process(cls, folder: Path) -> SignalFile:
        """One that no other process has."""
        host = re.sub(r"[^\w-]", "-", socket.gethostname())
        found = cls(folder / f"signals.{host}.{os.getpid()}")
        found.path.unlink(missing_ok=True)
        return found

    @property
    def count(self) -> int:
        """How many there were."""
        try:
            return len(self.path.read_bytes())
        except FileNotFoundError:
            return 0

    def add(self) -> None:
        """Count one more."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(b".")


class Onlooker(Engine):
    """An engine whose runs are worked on by processes that a cluster has started.

    Args:
        work: what is asked.
        folder: of what the cluster's tool writes, a hidden one in that of the study.

    Attributes:
        signals: told to those processes.
    """

    def __init__(self, work: Work, folder: Path) -> None:
        super().__init__(work)
        try:
            self.signals = SignalFile.of_this_process(folder)
        except OSError as error:
            raise ConfigError(f"root: {folder}: {error.strerror}; expected a folder that can be written") from error
        self._came = 0

    @property
    def share(self) -> Work:
        """What each of those processes is asked to do: what is left, together with the others."""
        return replace(self.work, runs=self.left, watch=unwatched, tried=self.tried)

    @contextmanager
    def signals_handed_on(self, cancel: Callable[[], None] | None = None) -> Iterator[None]:
        """Hand on the signals that come meanwhile; `cancel` ends what has not begun."""

        def handle(number: int, frame: object) -> None:
            self._came += 1
            self.signal = self.signal or signal.Signals(number)
            self.signals.add()
            if cancel is not None:
                cancel()

        try:
            with handled_by(handle):
                yield
        finally:
            self.signals.path.unlink(missing_ok=True)

    def follow(self, working: Callable[[], bool]) -> None:
        """Look at the runs for as long as somebody works on them."""
        while working() and self._came < _LAST_SIGNAL:
            self._look()
            self.work.watch(self)
            time.sleep(_PAUSE)
        self._look()
        self.statuses = ["stopped" if status in ("running", "waiting") else status for status in self.statuses]
        self.work.watch(self)

    def _look(self) -> None:
        for index, (record, status) in enumerate(zip(self.records, self.statuses, strict=True)):
            if status in OVER:
                continue
            state = record.state
            if state not in OVER and Hold.is_held(record):
                self.statuses[index] = "running"
            else:
                # Stopped, for now: a job may yet go on with it.
                self.statuses[index] = OVER.get(state, "failed" if state == "failed" else "waiting")
