"""What stands on disk about a run of a study: what it was started with, how it ended, and who holds it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from hybridvl.checkpoints.files import read_record, write_json
from hybridvl.layers.errors import ConfigError
from hybridvl.pipeline.processes import Ended

State = Literal["new", "stopped", "failed", "pruned", "done"]

_LAST_BYTES = 20_000  # of a log, in which its last words are looked for


@dataclass(frozen=True)
class RunRecord:
    """The files about one run, in its folder and beside it.

    Beside the folder VERSION stand VERSION.json (what it was started with), VERSION.log (its output),
    VERSION.ended.json (how its last process ended), .VERSION.lock (held while a process works on it), and, if a search
    has given it up, VERSION.pruned.json (when and why).
    """

    folder: Path

    @property
    def started(self) -> Path:
        """What it was started with."""
        return self.folder.with_name(f"{self.folder.name}.json")

    @property
    def ended(self) -> Path:
        """How its last process ended."""
        return self.folder.with_name(f"{self.folder.name}.ended.json")

    @property
    def pruned(self) -> Path:
        """When and why a search gave it up; not there for other runs."""
        return self.folder.with_name(f"{self.folder.name}.pruned.json")

    @property
    def log(self) -> Path:
        """The output of its processes, one after another."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def checkpoint(self) -> Path:
        """The checkpoint to go on from."""
        return self.folder / "checkpoints" / "last.ckpt"

    @property
    def metrics(self) -> dict[str, Any]:
        """metrics.json; {} while there is none."""
        return read_record(self.folder / "metrics.json")

    @property
    def progress(self) -> dict[str, Any]:
        """progress.json; {} while there is none."""
        return read_record(self.folder / "progress.json")

    @property
    def curve(self) -> Path:
        """A line for each of its validations."""
        return self.folder / "validations.jsonl"

    @property
    def validations(self) -> list[dict[str, Any]]:
        """What its validations came to, a mapping of step, steps and metrics each; a resumed run may repeat some."""
        lines = self.curve.read_bytes().split(b"\n")[:-1] if self.curve.exists() else []  # the last may be half of one
        found = [_mapping(line) for line in lines]
        return [entry for entry in found if entry]

    @property
    def state(self) -> State:
        """ "done" when its fit is through with everything; "failed" when it gave up; "stopped" when it was ended;
        "pruned" when a search has given it up, however far it came until its process heard of that.

        What the fit itself has written decides whether it is done, so that it is so even if nobody was left to see it.
        """
        if self.pruned.exists():
            return "pruned"
        if not self.started.exists():
            return "new"
        if "ended" in self.metrics:
            return "done"
        ended = read_record(self.ended)
        # A fit that ends well says so in metrics.json; one that does not, and yet has exit status 0, has failed, too.
        return "failed" if ended.get("status", -1) >= 0 and ended.get("signal") is None else "stopped"

    @property
    def attempts(self) -> int:
        """How often it was begun."""
        return int(read_record(self.started).get("attempts", 0))

    @property
    def reason(self) -> str:
        """Why it was pruned, or its last process ended without success, for people."""
        return str(read_record(self.pruned).get("reason") or read_record(self.ended).get("reason", ""))

    def check(self, key: str) -> None:
        """Raise ConfigError if the run was started with other settings."""
        known = read_record(self.started).get("key", key)
        if known != key:
            raise ConfigError(
                f"{self.folder}: was started with other settings than those of the study now (see {self.started}); "
                "give the study another name, or remove the run"
            )

    def begin(self, key: str, labels: dict[str, str], seed: int, arguments: Sequence[str]) -> list[str]:
        """Write what it is started with; returns the arguments of the fit, which goes on from a checkpoint if it can.

        What a process has left that was ended before its first checkpoint is removed: the new one begins again.
        """
        words = list(arguments)
        try:
            if self.checkpoint.exists():
                words.append(f"--ckpt_path={self.checkpoint}")
            elif self.folder.exists():
                shutil.rmtree(self.folder)
            self.ended.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"root: {self.folder}: cannot be begun again: {error.strerror}") from error
        before = self.log.stat().st_size if self.log.exists() else 0
        facts = {
            "key": key,
            "labels": labels,
            "seed": seed,
            "arguments": words,
            "attempts": self.attempts + 1,
            "log_from": before,
        }
        write_json(self.started, {**facts, "started": _now()})
        return words

    def finish(self, ended: Ended) -> None:
        """Write how its process ended, and the reason if that was not well."""
        facts = {"status": ended.status, "signal": ended.signal, "reason": self._reason(ended), "ended": _now()}
        write_json(self.ended, facts)

    def prune(self, reason: str) -> None:
        """Write that a search gives it up, and why."""
        write_json(self.pruned, {"reason": reason, "pruned": _now()})

    def _reason(self, ended: Ended) -> str:
        if not ended.status and "ended" in self.metrics:
            return ""
        lines = _last_lines(self.log, int(read_record(self.started).get("log_from", 0)))
        mistakes = [line for line in lines if line.startswith("error: ")]
        if not ended.status:
            return "the fit ended without a word of its end in metrics.json (fast_dev_run, or another logger?)"
        return (mistakes or lines or [f"exit status {ended.status}"])[-1].removeprefix("error: ")


class Hold:
    """The right to work on a run, for as long as this process or one it was handed on to lives.

    Attributes:
        handle: the open lock file; a process that inherits it holds the run, too.
    """

    def __init__(self, handle: int) -> None:
        self.handle = handle

    @classmethod
    def of(cls, record: RunRecord) -> Hold | None:
        """Take hold of a run; None if another process has it."""
        handle = _locked(record.folder.with_name(f".{record.folder.name}.lock"), fcntl.LOCK_EX | fcntl.LOCK_NB)
        return None if handle is None else cls(handle)

    @classmethod
    def is_held(cls, record: RunRecord) -> bool:
        """Whether a process works on a run now."""
        if not record.started.exists():
            return False
        hold = cls.of(record)
        if hold is None:
            return True
        hold.release()
        return False

    def release(self) -> None:
        """Give it up."""
        os.close(self.handle)


def attempts_in(folder: Path) -> dict[Path, int]:
    """How often each run of a study was begun, by its folder; those never begun are not there."""
    others = (".ended.json", ".pruned.json")
    found = [path.with_suffix("") for path in folder.glob("*/*.json") if not path.name.endswith(others)]
    return {run: RunRecord(run).attempts for run in found}


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other process is within this for the same folder."""
    handle = _locked(folder / ".lock", fcntl.LOCK_EX)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _locked(path: Path, how: int) -> int | None:
    """A lock file, open and locked; None if it does not wait and another process has it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(f"root: {path}: cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(handle, how)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError as error:
        os.close(handle)
        raise ConfigError(
            f"root: {path}: cannot be locked: {error.strerror}; expected a file system with flock, such as one of this "
            "machine, NFS 4, or Lustre mounted with -o flock"
        ) from error
    return handle


def _last_lines(path: Path, start: int) -> list[str]:
    """The last lines of a log from a place in it on."""
    try:
        with path.open("rb") as file:
            file.seek(max(start, path.stat().st_size - _LAST_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return [line.strip() for line in text.splitlines() if line.strip()]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _mapping(line: bytes) -> dict[str, Any]:
    """A line of JSON; {} for half of one, which a process that was killed has left."""
    try:
        content = json.loads(line)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
