"""Engines: where runs go, how signals reach them, and what is done about those that fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridvl.ablation import engine as engines
from hybridvl.ablation import local
from hybridvl.ablation.cells import Cell, Run
from hybridvl.ablation.engine import Engine, Onlooker, SignalFile, Work
from hybridvl.ablation.local import LocalEngine, Slot, own_slots, slots
from hybridvl.ablation.records import Hold, RunRecord
from hybridvl.ablation.slurm import work_on_share
from hybridvl.layers.errors import ConfigError
from hybridvl.pipeline.processes import Ended


@given(
    jobs=st.none() | st.integers(1, 9),
    cores=st.lists(st.integers(0, 63), min_size=1, max_size=8, unique=True),
    gpus=st.lists(st.integers(0, 7).map(str), max_size=4, unique=True),
)
def test_slots_share_what_there_is(jobs: int | None, cores: list[int], gpus: list[str]) -> None:
    found = slots(jobs, cores, gpus)
    assert len(found) == (jobs or len(gpus) or len(cores))
    dealt = [core for slot in found for core in slot.cores]
    assert set(dealt) == set(cores) if len(found) <= len(cores) else set(dealt) <= set(cores)
    if len(found) <= len(cores):  # nothing is shared, and no slot has two cores more than another
        assert len(dealt) == len(cores)
        assert max(len(slot.cores) for slot in found) - min(len(slot.cores) for slot in found) <= 1
    assert all(len(slot.cores) >= 1 for slot in found)
    used = [slot.gpus for slot in found]
    assert used == ([gpus[number % len(gpus)] for number in range(len(found))] if gpus else [None] * len(found))


def test_a_slot_sets_threads_and_gpu() -> None:
    assert Slot((3, 5)).environment["OMP_NUM_THREADS"] == "2"
    assert "CUDA_VISIBLE_DEVICES" not in Slot((3,)).environment
    assert Slot((3,), "GPU-1").environment["CUDA_VISIBLE_DEVICES"] == "GPU-1"


def _engine(folder: Path, count: int = 4) -> LocalEngine:
    runs = [
        Run(Cell({"a": str(number)}, {}, f"a={number}"), 0, folder / f"a={number}" / "seed_0", [], "key")
        for number in range(count)
    ]
    return LocalEngine(Work(runs, folder), [Slot((0,)), Slot((1,))])


@pytest.mark.parametrize("moment", ["begin", "start"])
def test_a_signal_while_a_run_is_started_reaches_it(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = _engine(tmp_path, 1)
    begin, start = RunRecord.begin, local._start

    def signalled_begin(*arguments: object) -> list[str]:
        words = begin(*arguments)  # type: ignore[arg-type]
        if moment == "begin":
            os.kill(os.getpid(), signal.SIGTERM)
        return words

    def sleeper(arguments: object, log: Path, slot: Slot, held: int) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(["sleep", "60"])
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(RunRecord, "begin", signalled_begin)
    monkeypatch.setattr(local, "_start", sleeper if moment == "start" else start)
    began = time.monotonic()
    engine.run()
    assert time.monotonic() - began < 30
    assert engine.statuses == ["stopped"]
    assert engine.signal == signal.SIGTERM


def _quick_fits(monkeypatch: pytest.MonkeyPatch, words: str = "true") -> None:
    """Let runs be processes that end at once."""

    def start(arguments: object, log: Path, slot: Slot, held: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(words.split(), start_new_session=True)

    monkeypatch.setattr(local, "_start", start)


@pytest.mark.parametrize("broken", ["begin", "finish"])
def test_a_record_that_cannot_be_kept_fails_its_run_alone(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _quick_fits(monkeypatch)
    right = getattr(RunRecord, broken)

    def once_full(record: RunRecord, *arguments: object) -> object:
        if record.folder.parent.name == "a=1":
            raise ConfigError(f"{record.started}: cannot be written: Disk quota exceeded")
        return right(record, *arguments)

    monkeypatch.setattr(RunRecord, broken, once_full)
    engine = _engine(tmp_path, 3)
    engine.run()
    # Processes that end with status 0 and leave nothing have failed.
    assert engine.statuses == ["failed", "failed", "failed"]
    assert engine.reason(1).endswith("a=1/seed_0.json: cannot be written: Disk quota exceeded")
    assert "without a word of its end" in engine.reason(0)
    assert not any(Hold.is_held(record) for record in engine.records)
    again = _engine(tmp_path, 3)
    assert [str(status) for status in again.statuses] == ["failed", "waiting", "failed"]


def test_a_sweep_that_cannot_begin_anything_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(record: RunRecord, *arguments: object) -> None:
        raise ConfigError("a=0/seed_0.json: cannot be written: No space left on device")

    monkeypatch.setattr(RunRecord, "begin", full)
    engine = _engine(tmp_path)
    with pytest.raises(ConfigError, match="No space left"):
        engine.run()
    assert not any(Hold.is_held(record) for record in engine.records)


def test_signals_come_through_a_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one is handed on as SIGTERM, the second one kills; a signal that came both ways counts once."""
    stubborn = "trap 'echo heard >> heard' TERM; while true; do sleep 0.05; done"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        local, "_start", lambda *given: subprocess.Popen(["sh", "-c", stubborn], start_new_session=True)
    )
    signals = SignalFile.of_this_process(tmp_path / ".slurm")
    assert signals.count == 0
    looks = []

    def watch(engine: Engine) -> None:
        looks.append(0)
        if len(looks) == 3:
            signals.add()
        elif len(looks) == 6:  # the same Ctrl-C, by another way
            os.kill(os.getpid(), signal.SIGTERM)
        elif len(looks) == 10:
            signals.add()

    runs = [Run(Cell({"a": "0"}, {}, "a=0"), 0, tmp_path / "a=0" / "seed_0", [], "key")]
    engine = LocalEngine(Work(runs, tmp_path, watch=watch), [Slot((0,))], signals)
    engine.run()
    assert (tmp_path / "heard").read_text() == "heard\n"
    assert engine.statuses == ["stopped"]
    ended = json.loads(engine.records[0].ended.read_text())
    assert (ended["status"], ended["signal"]) == (-signal.SIGKILL, signal.SIGTERM)


def test_after_the_third_signal_nobody_looks_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_PAUSE", 0.01)
    told: list[int] = []
    cancelled: list[int] = []

    def watch(looking: Engine) -> None:
        told.append(onlooker.signals.count)
        os.kill(os.getpid(), signal.SIGINT)

    onlooker = Onlooker(replace(_engine(tmp_path, 2).work, watch=watch), tmp_path / ".slurm")
    with onlooker.signals_handed_on(lambda: cancelled.append(0)):
        onlooker.follow(lambda: True)  # jobs that do not end
    assert told == [0, 1, 2, 3]  # the last look comes after all
    assert len(cancelled) == 4
    assert (onlooker.signal, onlooker.statuses) == (signal.SIGINT, ["stopped", "stopped"])
    assert not onlooker.signals.path.exists()


def test_what_failed_is_left_alone_unless_it_is_wanted(tmp_path: Path) -> None:
    for number, ended in enumerate([Ended(2, None), Ended(-signal.SIGKILL, None)]):
        record = RunRecord(tmp_path / f"a={number}" / "seed_0")
        record.begin("key", {}, 0, [])
        record.finish(ended)
    engine = _engine(tmp_path, 3)
    assert engine.statuses == ["failed", "waiting", "waiting"]
    assert engine.left == engine.runs[1:]
    again = LocalEngine(Work(engine.runs, tmp_path, retry_failed=True), [Slot((0,))])
    assert again.left == engine.runs


def test_what_failed_is_tried_again_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whichever of the jobs of a sweep comes first, and not again by one that is requeued."""
    _quick_fits(monkeypatch, "false")
    monkeypatch.chdir(tmp_path)  # as jobs do
    first = _engine(tmp_path, 2)
    first.run()
    assert [record.attempts for record in first.records] == [1, 1]
    work = Work(first.runs, tmp_path, retry_failed=True)
    onlooker = Onlooker(work, tmp_path / ".slurm")
    engines = [LocalEngine(work, [Slot((0,))]) for _ in range(3)]
    for engine in engines:
        assert engine.left == first.runs
        engine.run()
        assert engine.statuses == ["failed", "failed"]
        assert [record.attempts for record in engine.records] == [2, 2]
    work_on_share(replace(work, runs=onlooker.left, tried=onlooker.tried), str(tmp_path), onlooker.signals)  # requeued
    assert [record.attempts for record in first.records] == [2, 2]
    LocalEngine(work, [Slot((0,))]).run()  # another sweep
    assert [record.attempts for record in first.records] == [3, 3]


def test_this_process_has_cores() -> None:
    """What the command deals out is what this process may use."""
    allowed = os.sched_getaffinity(0)
    assert {core for slot in own_slots(None) for core in slot.cores} == allowed
