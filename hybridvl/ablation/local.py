"""The local engine: runs as processes of this machine, as many at a time as it has cores or GPUs for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hybridvl.ablation.engine import OVER, Engine, SignalFile, Status, Work
from hybridvl.ablation.records import Hold, RunRecord
from hybridvl.data.loader import end_with_parent
from hybridvl.layers.errors import ConfigError
from hybridvl.pipeline.processes import Ended, handled_by

_POLL = 0.2  # seconds between two looks at the processes
_POLL_OTHERS = 2.0  # seconds between two looks at the runs that other processes work on


@dataclass(frozen=True)
class Slot:
    """Where one process runs.

    Attributes:
        cores: numbers of the processor's cores.
        gpus: what CUDA_VISIBLE_DEVICES says; None leaves it as it is.
        bound: whether the process may use no other cores; otherwise only their number counts.
    """

    cores: tuple[int, ...]
    gpus: str | None = None
    bound: bool = True

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the process."""
        threads = str(len(self.cores))
        own = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
        return own if self.gpus is None else {**own, "CUDA_VISIBLE_DEVICES": self.gpus}


@dataclass
class _Running:
    index: int
    slot: Slot
    record: RunRecord
    hold: Hold
    process: subprocess.Popen[bytes]


def slots(jobs: int | None, cores: Sequence[int], gpus: Sequence[str]) -> list[Slot]:
    """Cores dealt out evenly to `jobs` processes; by default one process a GPU, or a core where there is none.

    More jobs than cores or GPUs share them in turn.
    """
    count = jobs if jobs is not None else len(gpus) or len(cores)
    dealt = [tuple(cores[number::count]) or (cores[number % len(cores)],) for number in range(count)]
    return [Slot(own, gpus[number % len(gpus)] if gpus else None) for number, own in enumerate(dealt)]


def own_slots(jobs: int | None) -> list[Slot]:
    """The cores and GPUs that this process may use, dealt out to `jobs` processes; see `slots`."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    return slots(jobs, cores, visible_gpus())


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None and torch.cuda.is_available():
        return [name for name in given.split(",") if name]
    return [str(number) for number in range(torch.cuda.device_count())]


class LocalEngine(Engine):
    """Runs what is not done yet and says of each run how it stands.

    Several engines, in processes of one machine or of several that share the folder, work on the same runs without
    doing one twice: whoever holds a run's lock works on it, the others wait for it to be done or given up.

    Args:
        work: what to run.
        places: where; one process each at a time.
        signals: that it gets by a file, besides those of its own process.
    """

    def __init__(self, work: Work, places: Sequence[Slot], signals: SignalFile | None = None) -> None:
        super().__init__(work)
        self._free = list(places)
        self._running: list[_Running] = []
        self._signals = signals
        self._came = 0
        self._has_begun = False
        self._looked = float("-inf")

    def run(self) -> None:
        """Run to the end, or until a signal: the first SIGINT or SIGTERM is handed on, the second one kills.

        Raises:
            ConfigError: not even the first run could be begun. Afterwards, a run whose record cannot be kept has
                failed, and the others go on.
        """
        with handled_by(self._stop):
            while True:
                if self._signals is not None and (count := self._signals.count):
                    self._hand_on(signal.SIGTERM, kill=count > 1)
                self._reap()
                if self.signal is None:
                    self._fill()
                self.work.watch(self)
                waits = self.signal is None and any(status in ("waiting", "elsewhere") for status in self.statuses)
                if not self._running and not waits:
                    return
                time.sleep(_POLL)

    def _stop(self, number: int, frame: object) -> None:
        self._came += 1
        self._hand_on(number, kill=self._came > 1)

    def _hand_on(self, number: int, kill: bool) -> None:
        """Give a signal to the runs: once, however it has come."""
        if self.signal is None or kill:
            for running in self._running:
                running.process.send_signal(signal.SIGKILL if kill else number)
        self.signal = self.signal or number

    def _stopping(self) -> bool:
        """Whether a signal has come; it may do so at any time."""
        return self.signal is not None

    def _reap(self) -> None:
        for running in [one for one in self._running if one.process.poll() is not None]:
            self._running.remove(running)
            try:
                running.record.finish(Ended(running.process.returncode, self.signal))
            except ConfigError as error:
                self.reasons[running.index] = str(error)
            state = running.record.state
            gave_up = state == "failed" or running.index in self.reasons
            self.statuses[running.index] = OVER.get(state, "failed" if gave_up else "stopped")
            running.hold.release()
            self._free.append(running.slot)

    def _fill(self) -> None:
        """Start runs where there is room; look now and then at those that others had."""
        now = time.monotonic()
        looks = now - self._looked >= _POLL_OTHERS
        for index, status in enumerate(self.statuses):
            if self._stopping():
                return
            if self._free and (status == "waiting" or (status == "elsewhere" and looks)):
                self.statuses[index] = self._take(index)
            elif looks and status in ("waiting", "elsewhere"):
                self.statuses[index] = OVER.get(self.records[index].state, status)
        if looks:
            self._looked = now

    def _take(self, index: int) -> Status:
        """Begin a run, unless it is over or another process has it."""
        over = OVER.get(self.records[index].state)
        if over is not None:
            return over
        hold: Hold | None = None
        status: Status
        try:
            hold = Hold.of(self.records[index])
            status = "elsewhere" if hold is None else self._begin(index, hold)
        except (ConfigError, OSError) as error:
            if not self._has_begun:
                raise
            self.reasons[index] = str(error)
            status = "failed"
        if hold is not None and status != "running":
            hold.release()
        return status

    def _begin(self, index: int, hold: Hold) -> Status:
        run, record = self.runs[index], self.records[index]
        # Another process may have ended it between the look and the hold.
        state = record.state
        if state in OVER:
            return OVER[state]
        if state == "failed" and (self.statuses[index] == "elsewhere" or not self.tries_again(record)):
            return "failed"
        record.check(run.key)
        words = record.begin(run.key, run.cell.labels, run.seed, run.arguments)
        if self._stopping():  # since the last look
            return "stopped"
        process = _start(words, record.log, self._free[0], hold.handle)
        self._running.append(_Running(index, self._free.pop(0), record, hold, process))
        self._has_begun = True
        if self._stopping():  # before the process was known
            process.send_signal(self.signal or signal.SIGTERM)
        return "running"


def bound_to_slot(slot: Slot) -> Callable[[], None]:
    """What a new process does first: it takes its cores, and is killed when this one is."""
    parent = os.getpid()

    def begin() -> None:
        end_with_parent()
        if os.getppid() != parent:  # it was killed before this one could be bound to it
            os._exit(1)
        if slot.bound and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, slot.cores)

    return begin


def _start(arguments: Sequence[str], log: Path, slot: Slot, held: int) -> subprocess.Popen[bytes]:
    """A fit with its output in a log, which holds an open file."""
    with log.open("ab") as output:
        # In a session of its own, so that Ctrl-C reaches it only through this process.
        return subprocess.Popen(
            [sys.executable, "-m", "hybridvl", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **slot.environment},
            start_new_session=True,
            pass_fds=(held,),
            preexec_fn=bound_to_slot(slot),
        )
