"""What all engines have in common: runs, how each stands, and looking that up where others work on them."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from hybridvl.ablation.cells import Run
from hybridvl.ablation.records import Claim, RunRecord
from hybridvl.pipeline.processes import handled_by

Status = Literal["waiting", "running", "elsewhere", "done", "pruned", "failed", "stopped"]

_PAUSE = 1.0  # seconds between two looks at runs that others work on


class Engine:
    """Runs of a study and how they stand.

    Attributes:
        runs: as given.
        records: what stands on disk about each.
        statuses: of each run now; "running" here, or "elsewhere".
        signal: the first signal that has come, if any.
        ahead: how many runs are still to come that are not known yet, as a search chooses them one after another.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = list(runs)
        self.records = [RunRecord(run.folder) for run in self.runs]
        self.statuses: list[Status] = ["waiting"] * len(self.runs)
        self.signal: int | None = None
        self.ahead = 0
        for index, (run, record) in enumerate(zip(self.runs, self.records, strict=True)):
            record.check(run.key)
            if record.state == "done":
                self.statuses[index] = "done"


Watch = Callable[[Engine], None]
"""Called some times a second, and once at the end."""


class Onlooker(Engine):
    """An engine whose runs are worked on by processes that a cluster has started."""

    def follow(self, working: Callable[[], bool], stop: Callable[[], None], watch: Watch) -> None:
        """Look at the runs for as long as somebody works on them; `stop` is called when a signal comes."""
        with self._stopped_by_signals(stop):
            while working():
                self._look()
                watch(self)
                time.sleep(_PAUSE)
        self._look()
        self.statuses = ["stopped" if status in ("running", "waiting") else status for status in self.statuses]
        watch(self)

    @contextmanager
    def _stopped_by_signals(self, stop: Callable[[], None]) -> Iterator[None]:
        def handle(number: int, frame: object) -> None:
            self.signal = self.signal or signal.Signals(number)
            stop()

        with handled_by(handle):
            yield

    def _look(self) -> None:
        for index, (record, status) in enumerate(zip(self.records, self.statuses, strict=True)):
            if status == "done":
                continue
            state = record.state
            if state != "done" and Claim.is_held(record):
                self.statuses[index] = "running"
            else:
                # Stopped, for now: a job may yet go on with it.
                self.statuses[index] = state if state in ("done", "pruned", "failed") else "waiting"
