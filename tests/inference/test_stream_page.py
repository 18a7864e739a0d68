"""docs/stream.md runs as it stands, and knows every flag of the command."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from hybridvl.cli import main
from hybridvl.inference.streaming import StreamingSession

PAGE = (Path(__file__).parents[2] / "docs" / "stream.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def without_rates(text: str) -> str:
    return re.sub(r"[\d.,]+ frames/s end to end \(.*? ms\)", "_ frames/s", text)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    printed: list[str] = []
    for kind, text in BLOCKS:
        if kind == "python":
            exec(compile(text, "stream.md", "exec"), names)
        for line in text.splitlines() if kind == "bash" else ():
            command = shlex.split(line)
            if "tiny" not in command:  # a model that would have to be downloaded
                continue
            capsys.readouterr()
            assert main(command[1:]) == 0
            shown = capsys.readouterr()
            printed.append(shown.out + shown.err)
    (example,) = (text for kind, text in BLOCKS if not kind)
    assert [without_rates(text) for text in printed] == [without_rates(example)]
    # The session of the page saw what the command showed.
    reply, _, pooled = capsys.readouterr().out.partition("\n")
    again, fork = names["again"], names["fork"]
    assert isinstance(again, StreamingSession)
    assert (again.timeline.frames, again.timeline.tokens, again.state_bytes) == (10, 135, 34_840)
    assert reply.endswith(" (10 frames, 135 tokens, 34,840 bytes)")
    assert pooled.startswith("0 ")
    assert "\n1 " in pooled
    assert list(names["pool"].sessions) == [1]
    assert fork.timeline.text == "The end."
    assert names["session"].timeline.frames == 0


def test_every_flag_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stream", "--help"]) == 0
    flags = set(re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.MULTILINE))
    assert flags
    assert flags <= set(re.findall(r"--[\w-]+", PAGE))
