"""docs/generate.md runs as it stands, and knows every flag of the command."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from hybridvl.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "generate.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def without_rates(text: str) -> str:
    return re.sub(r"[\d.,]+ tokens/s", "_ tokens/s", text)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    printed: list[Any] = []
    for kind, text in BLOCKS:
        if kind == "python":
            exec(compile(text, "generate.md", "exec"), names)
        for line in text.splitlines() if kind == "bash" else ():
            command = shlex.split(line)
            if command[2] != "tiny":  # a model that would have to be downloaded
                continue
            capsys.readouterr()
            assert main(command[1:]) == 0
            printed.append(capsys.readouterr())
    (shown,) = (text for kind, text in BLOCKS if not kind)
    assert [without_rates(output.err) for output in printed] == [
        "prompt 109 tokens, prefill _ tokens/s, decode _ tokens/s, state 34,840 bytes\n",
        "prompt 213 tokens, prefill _ tokens/s, decode _ tokens/s, state 69,680 bytes\n",
    ]
    assert without_rates(printed[0].out + printed[0].err) == without_rates(shown)
    assert names["tokens"].shape[1] == names["inputs"]["input_ids"].shape[1] + 8


def test_every_flag_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--help"]) == 0
    flags = set(re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.MULTILINE))
    assert flags
    assert flags <= set(re.findall(r"--[\w-]+", PAGE))
