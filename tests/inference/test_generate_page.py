"""docs/generate.md runs as it stands, and knows every flag of the command."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from hybridvl.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "generate.md").read_text(encoding="utf-8")


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    commands = 0
    for kind, text in re.findall(r"^```(python|bash)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        if kind == "python":
            exec(compile(text, "generate.md", "exec"), names)
            continue
        for line in text.splitlines():
            command = shlex.split(line)
            if command[2] != "tiny":  # a model that would have to be downloaded
                continue
            capsys.readouterr()
            assert main(command[1:]) == 0
            assert re.fullmatch(
                r"prompt [\d,]+ tokens, prefill .*, decode .*, state [\d,]+ bytes\n", capsys.readouterr().err
            )
            commands += 1
    assert commands == 2
    assert names["tokens"].shape[1] == names["inputs"]["input_ids"].shape[1] + 8


def test_every_flag_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--help"]) == 0
    flags = set(re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.MULTILINE))
    assert flags
    assert flags <= set(re.findall(r"--[\w-]+", PAGE))
