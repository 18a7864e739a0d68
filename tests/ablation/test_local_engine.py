"""Where runs go, what stands on disk about them, who may work on them, and how they are shown."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from hybridvl.ablation import local
from hybridvl.ablation.cells import Cell, Run
from hybridvl.ablation.engine import Engine, Onlooker, SignalFile, Work
from hybridvl.ablation.local import LocalEngine, Slot, own_slots, slots
from hybridvl.ablation.records import Hold, RunRecord, one_at_a_time
from hybridvl.ablation.slurm import work_on_share
from hybridvl.cli.sweep_view import SweepView
from hybridvl.layers.errors import ConfigError
from hybridvl.pipeline.processes import Ended

HOLDER = """
import sys
from pathlib import Path
from hybridvl.ablation.records import Hold, RunRecord
hold = Hold.of(RunRecord(Path(sys.argv[1])))
print("none" if hold is None else "held", flush=True)
sys.stdin.read()
"""


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


def _write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_the_states_of_a_run(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "a=1" / "seed_0")
    assert record.state == "new"
    assert record.begin("key", {"a": "1"}, 0, ["fit", "--x=1"]) == ["fit", "--x=1"]
    assert record.state == "stopped"  # as if its process and the sweep had been killed
    record.log.write_text("warning: slow\nerror: data.max_tokens: 8 is too small\nusage: hybridvl\n")
    record.finish(Ended(2, None))
    assert (record.state, record.reason) == ("failed", "data.max_tokens: 8 is too small")
    record.log.write_text("error: an older mistake\n")
    record.begin("key", {"a": "1"}, 0, [])
    record.log.write_text("error: an older mistake\nZeroDivisionError: division by zero\n")
    record.finish(Ended(1, None))
    assert (record.state, record.reason) == ("failed", "ZeroDivisionError: division by zero")
    record.finish(Ended(0, None))
    assert record.state == "failed"
    assert "without a word of its end" in record.reason
    for ended in (Ended(-signal.SIGKILL, None), Ended(130, signal.SIGINT)):
        record.begin("key", {"a": "1"}, 0, [])
        record.finish(ended)
        assert record.state == "stopped"
    _write(record.folder / "metrics.json", {"metrics": {}})  # of the fit; its test is still to come
    assert record.state == "stopped"
    _write(record.folder / "metrics.json", {"metrics": {}, "ended": "2026-01-01T00:00:00+00:00"})
    assert record.state == "done"  # whatever the record of its end says
    assert json.loads(record.started.read_text())["attempts"] == 4


def test_a_run_goes_on_from_its_checkpoint_or_begins_again(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "a=1" / "seed_0")
    (record.folder / "checkpoints").mkdir(parents=True)
    (record.folder / "events.1").touch()
    record.begin("key", {}, 0, ["fit"])
    assert not record.folder.exists()
    record.checkpoint.parent.mkdir(parents=True)
    record.checkpoint.touch()
    assert record.begin("key", {}, 0, ["fit"]) == ["fit", f"--ckpt_path={record.checkpoint}"]
    assert record.checkpoint.exists()


def test_a_run_of_other_settings_is_refused(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "a=1" / "seed_0")
    record.check("one")
    record.begin("one", {}, 0, [])
    record.check("one")
    with pytest.raises(ConfigError, match=r"a=1/seed_0: was started with other settings than those of the study now"):
        record.check("other")


def test_a_hold_lasts_until_its_process_has_gone(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "a=1" / "seed_0")
    command = [sys.executable, "-c", HOLDER, str(record.folder)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    assert Hold.of(record) is None
    holder.kill()
    holder.communicate()
    hold = Hold.of(record)
    assert hold is not None
    # A process that it was handed on to holds it when its first owner has let go.
    heir = subprocess.Popen(["sleep", "60"], pass_fds=(hold.handle,))
    hold.release()
    assert Hold.of(record) is None
    heir.kill()
    heir.wait()
    again = Hold.of(record)
    assert again is not None
    again.release()


def _engine(folder: Path, view: SweepView, count: int = 4) -> LocalEngine:
    runs = [
        Run(Cell({"a": str(number)}, {}, f"a={number}"), 0, folder / f"a={number}" / "seed_0", [], "key")
        for number in range(count)
    ]
    return LocalEngine(Work(runs, folder, watch=view), [Slot((0,)), Slot((1,))])


def test_the_table_has_paces_times_and_scores(tmp_path: Path) -> None:
    now = [100.0]
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    view = SweepView(["val/exact"], console, lambda: now[0])
    engine = _engine(tmp_path, view)
    engine.statuses = ["running", "running", "waiting", "failed"]
    view(engine)
    now[0] = 160.0
    _write(engine.runs[0].folder / "metrics.json", {"steps": 300, "tokens": 9000, "seconds": 50, "metrics": {}})
    progress = {"doing": "train", "step": 100, "steps": 300, "tokens": 3000, "seconds": 60.0}
    _write(engine.runs[1].folder / "progress.json", {**progress, "metrics": {"val/exact": 0.25}})
    engine.statuses = ["done", "running", "waiting", "failed"]
    view(engine)
    # The one that is running needs 120 s more, 180 in all; one is waiting, and runs take (60 + 180) / 2 s.
    assert view.summary(engine) == "1 of 4 done, 1 running, 1 failed, 1 waiting; about 2 min 00 s left"
    rows = list(zip(*(column._cells for column in view.table(engine).columns), strict=True))
    shown = [[str(cell) for cell in row] for row in rows]
    assert shown == [
        ["a=0/seed_0", "done", "300/300", "180", "", ""],
        ["a=1/seed_0", "train", "100/300", "50", "2 min 00 s", "0.2500"],
        ["a=2/seed_0", "waiting", "", "", "", ""],
        ["a=3/seed_0", "failed", "", "", "", ""],
    ]


@pytest.mark.parametrize("moment", ["begin", "start"])
def test_a_signal_while_a_run_is_started_reaches_it(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = SweepView([], Console(file=io.StringIO()))
    engine = _engine(tmp_path, view, 1)
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


def test_many_runs_show_those_that_matter(tmp_path: Path) -> None:
    view = SweepView([], Console(file=io.StringIO(), force_terminal=True))
    engine = _engine(tmp_path, view, 100)
    engine.statuses = ["done"] * 90 + ["failed"] * 2 + ["running"] * 2 + ["waiting"] * 6
    table = view.table(engine)
    names = [str(cell) for cell in table.columns[0]._cells]
    assert names[-1] == "and 60 done"
    assert {f"a={number}/seed_0" for number in range(90, 100)} < set(names)


def test_a_log_has_a_line_for_every_change(tmp_path: Path) -> None:
    out = io.StringIO()
    view = SweepView(["val/exact"], Console(file=out, width=200))
    engine = _engine(tmp_path, view, 2)
    for statuses in (["running", "waiting"], ["running", "waiting"], ["failed", "waiting"]):
        engine.statuses = statuses  # type: ignore[assignment]
        if statuses[0] == "failed":
            _write(engine.records[0].ended, {"reason": "it broke"})
        view(engine)
    lines = out.getvalue().splitlines()
    assert lines[0] == "running   a=0/seed_0  (0 of 2 done, 1 running, 1 waiting)"
    assert lines[1] == "failed    a=0/seed_0  it broke  (0 of 2 done, 1 failed, 1 waiting)"
    assert len(lines) == 2


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
    engine = _engine(tmp_path, SweepView([], Console(file=io.StringIO())), 3)
    engine.run()
    # Processes that end with status 0 and leave nothing have failed.
    assert engine.statuses == ["failed", "failed", "failed"]
    assert engine.reason(1).endswith("a=1/seed_0.json: cannot be written: Disk quota exceeded")
    assert "without a word of its end" in engine.reason(0)
    assert not any(Hold.is_held(record) for record in engine.records)
    again = _engine(tmp_path, SweepView([], Console(file=io.StringIO())), 3)
    assert [str(status) for status in again.statuses] == ["failed", "waiting", "failed"]


def test_a_sweep_that_cannot_begin_anything_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(record: RunRecord, *arguments: object) -> None:
        raise ConfigError("a=0/seed_0.json: cannot be written: No space left on device")

    monkeypatch.setattr(RunRecord, "begin", full)
    engine = _engine(tmp_path, SweepView([], Console(file=io.StringIO())))
    with pytest.raises(ConfigError, match="No space left"):
        engine.run()
    assert not any(Hold.is_held(record) for record in engine.records)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_named(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(handle: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ConfigError, match=r"root: .*/\.seed_0\.lock: cannot be locked: .*expected .* flock"):
        Hold.of(RunRecord(tmp_path / "a=1" / "seed_0"))
    with pytest.raises(ConfigError, match=r"root: .*/\.lock: cannot be locked: "), one_at_a_time(tmp_path):
        pass


def test_one_at_a_time(tmp_path: Path) -> None:
    inside: list[str] = []

    def enter(name: str) -> None:
        with one_at_a_time(tmp_path):
            inside.append(f"{name} in")
            time.sleep(0.1)
            inside.append(f"{name} out")

    others = [threading.Thread(target=enter, args=(name,)) for name in "abc"]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert [line.split()[0] for line in inside[::2]] == [line.split()[0] for line in inside[1::2]]
    assert sorted(inside) == sorted(f"{name} {way}" for name in "abc" for way in ("in", "out"))


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


def test_what_failed_is_left_alone_unless_it_is_wanted(tmp_path: Path) -> None:
    view = SweepView([], Console(file=io.StringIO()))
    for number, ended in enumerate([Ended(2, None), Ended(-signal.SIGKILL, None)]):
        record = RunRecord(tmp_path / f"a={number}" / "seed_0")
        record.begin("key", {}, 0, [])
        record.finish(ended)
    engine = _engine(tmp_path, view, 3)
    assert engine.statuses == ["failed", "waiting", "waiting"]
    assert engine.left == engine.runs[1:]
    again = LocalEngine(Work(engine.runs, tmp_path, retry_failed=True), [Slot((0,))])
    assert again.left == engine.runs


def test_what_failed_is_tried_again_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whichever of the jobs of a sweep comes first, and not again by one that is requeued."""
    _quick_fits(monkeypatch, "false")
    monkeypatch.chdir(tmp_path)  # as jobs do
    first = _engine(tmp_path, SweepView([], Console(file=io.StringIO())), 2)
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


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "a=1").write_text("a file")
    with pytest.raises(ConfigError, match=r"root: .*a=1/\.seed_0\.lock: cannot be written"):
        Hold.of(RunRecord(tmp_path / "a=1" / "seed_0"))


def test_this_process_has_cores() -> None:
    """What the command deals out is what this process may use."""
    allowed = os.sched_getaffinity(0)
    assert {core for slot in own_slots(None) for core in slot.cores} == allowed
