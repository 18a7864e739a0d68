"""The dispatcher: help, version, unknown commands, exit statuses."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

import hybridvl
from hybridvl.cli import main

COMMANDS = ("fit", "validate", "test", "predict", "pipeline", "generate", "plan", "bench", "doctor")


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n  {command} " in printed


def test_help_takes_less_than_a_third_of_a_second() -> None:
    code = "import sys; from hybridvl.cli import main; sys.exit(main(['--help']))"
    times = []
    for _ in range(4):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.3


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hybridvl {hybridvl.__version__}\n"


def test_as_a_module() -> None:
    found = subprocess.run([sys.executable, "-m", "hybridvl", "--version"], capture_output=True, text=True, check=True)
    assert found.stdout == f"hybridvl {hybridvl.__version__}\n"


def test_nothing_asked_prints_the_help_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().err


@pytest.mark.parametrize(("word", "hint"), [("fti", "did you mean 'fit'?"), ("doctr", "did you mean 'doctor'?")])
def test_unknown_commands_suggest_the_nearest(word: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: unknown command {word!r}, {hint}")
    assert captured.out == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"hybridvl {command}" in capsys.readouterr().out
