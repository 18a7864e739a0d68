"""docs/stream.md runs as it stands, and knows every flag of the command; so does what docs/serve.md has in Python."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from streaming_cases import stream_model, stream_processor
from video_cases import write_video

import hybridvl
from hybridvl.cli import main
from hybridvl.data.sources.interrupts import Interrupt
from hybridvl.inference.streaming import StreamingSession

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGE = (DOCS / "stream.md").read_text(encoding="utf-8")
BLOCKS = BLOCK.findall(PAGE)


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


def test_what_the_page_of_serve_has_in_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    hybridvl.save(stream_model(), "InfiniteVL")
    stream_processor().save("InfiniteVL")
    write_video("street.mp4", frames=48)
    blocks = BLOCK.findall((DOCS / "serve.md").read_text(encoding="utf-8"))
    (text,) = (text for kind, text in blocks if kind == "python")
    names: dict[str, Any] = {}
    exec(compile(text, "serve.md", "exec"), names)
    assert re.fullmatch(r".* \([\d.]+ ms a frame\)\n", capsys.readouterr().out, re.DOTALL)
    (side,) = names["both"].view.sides
    assert (side.name, side.frames >= 8) == ("ours", True)
    # As the stream calls it to begin anew.
    with names["opening"](Interrupt()) as source:
        assert [frame.time for frame in source] == [number / 2 for number in range(12)]


def test_every_flag_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stream", "--help"]) == 0
    flags = set(re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.MULTILINE))
    assert flags
    assert flags <= set(re.findall(r"--[\w-]+", PAGE))
