"""What stands on disk about a run of a study, and who may work on it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hybridvl.ablation.records import Hold, RunRecord, one_at_a_time
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


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_named(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(handle: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ConfigError, match=r"root: .*/\.seed_0\.lock: cannot be locked: .*expected .* flock"):
        Hold.of(RunRecord(tmp_path / "a=1" / "seed_0"))
    with pytest.raises(ConfigError, match=r"root: .*/\.lock: cannot be locked: "), one_at_a_time(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "a=1").write_text("a file")
    with pytest.raises(ConfigError, match=r"root: .*a=1/\.seed_0\.lock: cannot be written"):
        Hold.of(RunRecord(tmp_path / "a=1" / "seed_0"))


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


def test_lines_about_validations(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "a" / "seed_0")
    assert record.validations == []
    record.folder.mkdir(parents=True)
    text = '{"step": 1, "metrics": {}}\n{"step": 2, "met\n[1]\n{"step": 2, "metrics": {"val/loss": NaN}}\n{"step": 3'
    (record.folder / "validations.jsonl").write_text(text)
    assert [entry["step"] for entry in record.validations] == [1, 2]
