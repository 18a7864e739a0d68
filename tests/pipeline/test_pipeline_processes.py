"""Signals between a pipeline and the process of its stage: real processes, real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hybridvl.pipeline.processes import Ended, run_process

# Notes its number in a file, and in another one every signal that it gets; the third argument is what it does then.
CHILD = """
import os, signal, sys, time
def note(number, frame):
    with open(sys.argv[2], "a") as file:
        file.write(f"{number} ")
    if sys.argv[3] == "ends":
        sys.exit(7)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, note)
with open(sys.argv[1] + ".partial", "w") as file:
    file.write(str(os.getpid()))
os.rename(sys.argv[1] + ".partial", sys.argv[1])
while True:
    time.sleep(0.02)
"""


def _wait_for(path: Path) -> str:
    for _ in range(1500):
        if path.exists():
            return path.read_text()
        time.sleep(0.02)
    raise AssertionError(f"no {path}")


def _command(folder: Path, then: str) -> list[str]:
    return [sys.executable, "-c", CHILD, str(folder / "ready"), str(folder / "signals"), then]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_handed_on_once(number: signal.Signals, tmp_path: Path) -> None:
    before = signal.getsignal(number)

    def send() -> None:
        _wait_for(tmp_path / "ready")
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    assert run_process(_command(tmp_path, "ends")) == Ended(7, number)
    sender.join()
    assert (tmp_path / "signals").read_text() == f"{int(number)} "
    assert signal.getsignal(number) is before


def test_the_second_signal_kills(tmp_path: Path) -> None:
    def send() -> None:
        _wait_for(tmp_path / "ready")
        os.kill(os.getpid(), signal.SIGINT)
        assert _wait_for(tmp_path / "signals") == f"{int(signal.SIGINT)} "
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    assert run_process(_command(tmp_path, "goes on")) == Ended(-signal.SIGKILL, signal.SIGINT)
    sender.join()


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert (
            run_process([sys.executable, "-c", "import os, signal; os.kill(os.getppid(), signal.SIGINT)"]).status == 0
        )
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("code", "ended"), [("raise SystemExit(3)", Ended(3, None)), ("pass", Ended(0, None))])
def test_the_exit_status(code: str, ended: Ended) -> None:
    assert run_process([sys.executable, "-c", code]) == ended


def test_output_is_shown_at_once_and_in_order(capfd: pytest.CaptureFixture[str]) -> None:
    print("before")
    run_process([sys.executable, "-c", "import sys; print('out'); print('err', file=sys.stderr)"])
    print("after")
    shown = capfd.readouterr()
    assert shown.out.split() == ["before", "out", "after"]
    assert shown.err == "err\n"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_killed_pipeline_takes_its_stage_with_it(tmp_path: Path) -> None:
    code = f"from hybridvl.pipeline.processes import run_process; run_process({_command(tmp_path, 'goes on')!r})"
    pipeline = subprocess.Popen([sys.executable, "-c", code])
    stage = int(_wait_for(tmp_path / "ready"))
    pipeline.kill()
    assert pipeline.wait(30) == -signal.SIGKILL
    for _ in range(500):
        if not _is_running(stage):
            break
        time.sleep(0.02)
    else:
        pytest.fail("the stage goes on")
    assert not (tmp_path / "signals").exists()


def _is_running(process: int) -> bool:
    """Whether a process has not ended; one that nobody has waited for yet has."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
