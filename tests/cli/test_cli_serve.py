"""`hybridvl serve`: mistakes told before a model is loaded, and a page in Chromium that says what the library says."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
from model_cases import small_config
from streaming_cases import stream_model, stream_processor
from video_cases import decode_all, write_video

import hybridvl
from hybridvl.cli import main
from hybridvl.cli.replying import printable
from hybridvl.cli.serve import _shown_source
from hybridvl.inference import Processor
from hybridvl.inference.streaming import StreamingSession
from hybridvl.models.vlm import VisionLanguageModel

PAGE = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
RATE, TOKENS = 8, 6

SUMMARY = re.compile(r"(.*): ([\d,]+) frames, [\d.,]+ ms a frame at the end, ([\d,]+) tokens, state ([\d,]+) bytes")

# All that can be seen of the stream, at one moment; the picture as its mean colour.
SEEN = """
(async () => {
  const texts = (root, what) => [...root.querySelectorAll(what)].map(node => node.textContent);
  const image = document.querySelector(".serve-frame img");
  const found = {
    status: texts(document, ".serve-head .status")[0],
    time: texts(document, ".serve-frame .time")[0],
    sides: [...document.querySelectorAll(".serve-side")].map(side => [
      texts(side, ".name")[0], ...texts(side, ".numbers b"), texts(side, ".note")[0]]),
    talk: texts(document, ".serve-talk .text"),
    about: texts(document, ".serve-talk .about"),
    lines: [...document.querySelectorAll("svg path, .vega-embed canvas")].length,
  };
  if (image && found.status === "paused") { // and so will not be another one before it is decoded
    await image.decode();
    const canvas = Object.assign(document.createElement("canvas"), {width: 1, height: 1});
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(image, 0, 0, 1, 1);
    found.size = [image.naturalWidth, image.naturalHeight];
    found.shade = context.getImageData(0, 0, 1, 1).data[0];
  }
  return found;
})()
"""
CLICK = """[...document.querySelectorAll("button")].find(button => button.textContent.trim() === NAME).click()"""
TYPE = """
(() => {
  const box = document.querySelector("#question textarea, #question input");
  box.value = TEXT;
  box.dispatchEvent(new Event("input", {bubbles: true}));
})()
"""
BOX = """document.querySelector("#question textarea, #question input").value"""
OUTSIDE = """performance.getEntriesByType("resource").map(entry => entry.name)"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_of(tmp_path_factory.mktemp("serve") / "model", "swa gdn")


@pytest.fixture(scope="module")
def video(folder: Path) -> Path:
    return write_video(folder.parent / "bars.mp4", frames=96, rate=RATE)


def model_of(place: Path, pattern: str) -> Path:
    hybridvl.save(stream_model(pattern), place)
    stream_processor().save(place)
    return place


@contextmanager
def served(*arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of the page, and the process that serves it."""
    command = [sys.executable, "-m", "hybridvl", "serve", *arguments, "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            line = process.stdout.readline()
            found = re.match(r"(http://127\.0\.0\.1:\d+/) shows \S+; Ctrl-C ends it$", line)
            assert found is not None, line + process.communicate(timeout=60)[1]
            yield found[1], process
        finally:
            process.kill()


def wait_until(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + 90
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


def seconds(text: str) -> float:
    return float(re.fullmatch(r"([\d.]+) s", text)[1])


@browser.NEEDS_CHROMIUM
def test_the_page_in_a_browser(folder: Path, video: Path, tmp_path: Path) -> None:
    full = model_of(tmp_path / "full", "full*2")
    flags = ["--fps", str(RATE), "--realtime", "--max-new-tokens", str(TOKENS), "--baseline", str(full)]
    with (
        served(str(video), "--checkpoint", str(folder), *flags) as (address, process),
        browser.opened(tmp_path / "profile") as page,
    ):
        assert "Begin anew" in page.texts(address, {"Begin anew", "playing"})

        def seen() -> dict[str, Any]:
            return page.evaluate(SEEN)

        def ask(question: str) -> dict[str, Any]:
            page.evaluate(TYPE.replace("TEXT", json.dumps(question)))
            page.evaluate(CLICK.replace("NAME", '"Ask"'))
            wanted = [question, *(reply(pattern, time_of(seen()), question) for pattern in ("swa gdn", "full*2"))]
            wait_until(lambda: seen()["talk"][:3] == wanted)
            return seen()

        def reply(pattern: str, moment: float, question: str) -> str:
            return reply_at(folder if pattern == "swa gdn" else full, video, moment, question)

        early = wait_until(lambda: found if (found := seen())["sides"][0][1] != "?" else None)
        page.evaluate(CLICK.replace("NAME", '"Pause"'))
        first = wait_until(lambda: found if (found := seen())["status"] == "paused" else None)
        assert [side[0] for side in first["sides"]] == ["swa gdn", "full*2"]
        # The frame on the page is that of the time on the page.
        wanted = decode_all(video)[round(time_of(first) * RATE)]
        assert first["size"] == [wanted.shape[1], wanted.shape[0]]
        assert abs(first["shade"] - np.mean(wanted)) < 12
        # What was asked of the stream that stands still is answered as the library does, by both.
        talked = ask("What is <b>that</b>?")
        assert talked["about"] == [f"{name} at {first['time']}" for name in ("swa gdn", "full*2")]
        page.picture(tmp_path / "page.png")
        page.evaluate(CLICK.replace("NAME", '"Go on"'))
        wait_until(lambda: time_of(seen()) >= time_of(first) + 3)
        last = wait_until(lambda: found if (found := seen())["status"] == "ended" else None)
        assert time_of(last) == pytest.approx(95 / RATE, abs=0.1)
        assert float(last["sides"][0][2]) > 0
        for one, two in zip(early["sides"], last["sides"], strict=True):
            assert int(one[3]) < int(two[3])
        assert early["sides"][0][4] == last["sides"][0][4]
        assert float(early["sides"][1][4]) < float(last["sides"][1][4])
        assert last["lines"] > 0
        ask("And now?")
        outside = [name for name in page.evaluate(OUTSIDE) if not name.startswith((address, "data:", "blob:"))]
        assert outside == []
        page.evaluate(CLICK.replace("NAME", '"Begin anew"'))
        wait_until(lambda: "time" in (found := seen()) and time_of(found) < 3)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert (tmp_path / "page.png").stat().st_size > 30_000
    assert [line.partition(":")[0] for line in errors.splitlines()] == ["swa gdn", "full*2"]


def time_of(found: dict[str, Any]) -> float:
    return seconds(found["time"])


def reply_at(folder: Path, video: Path, moment: float, question: str, most: int = TOKENS) -> str:
    session = StreamingSession(hybridvl.load(folder).eval(), Processor.load(folder))
    for number in range(round(moment * RATE) + 1):
        session.push(decode_all(video)[number], number / RATE)
    return "".join(piece.text for piece in session.ask(question, most))


@browser.NEEDS_CHROMIUM
def test_a_draft_stays_while_a_reply_is_written(folder: Path, video: Path, tmp_path: Path) -> None:
    most = 300  # tokens: the reply takes about a second
    flags = ["--fps", str(RATE), "--realtime", "--no-baseline", "--max-new-tokens", str(most)]
    with (
        served(str(video), "--checkpoint", str(folder), *flags) as (address, _),
        browser.opened(tmp_path / "profile") as page,
    ):
        page.texts(address, {"Begin anew", "playing"})
        page.evaluate(CLICK.replace("NAME", '"Pause"'))
        moment = wait_until(lambda: time_of(found) if (found := page.evaluate(SEEN))["status"] == "paused" else None)
        page.evaluate(TYPE.replace("TEXT", '"What is that?"'))
        page.evaluate(CLICK.replace("NAME", '"Ask"'))
        wait_until(lambda: page.evaluate(BOX) == "")
        page.evaluate(TYPE.replace("TEXT", '"And th"'))
        whole = printable(reply_at(folder, video, moment, "What is that?", most))
        wait_until(lambda: page.evaluate(SEEN)["talk"][1:] == [whole])
        time.sleep(1)  # for what may still come
        assert page.evaluate(BOX) == "And th"


def test_the_default_baseline_stops_at_its_limit(folder: Path, video: Path) -> None:
    for patience in (2, 8, 32):  # seconds; 60 tokens are eight frames of a few milliseconds
        with served(str(video), "--checkpoint", str(folder), "--loop", "--baseline-tokens", "60") as (_, process):
            time.sleep(patience)
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        ours, full = (SUMMARY.fullmatch(line) for line in errors.splitlines())
        frames, tokens, size = (int(number.replace(",", "")) for number in full.groups()[1:])
        if frames < int(ours[2].replace(",", "")):
            break
    assert (ours[1], full[1]) == ("swa gdn", "full*2")
    assert frames < int(ours[2].replace(",", ""))
    assert 60 <= tokens < 60 + 8
    assert size >= 64 * 2 * 2 * 2 * 16 * 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--baseline", "fool*2"], "--baseline: layer pattern, column 1: unknown mixer 'fool', did you mean 'full'?"),
        (["--baseline", "full*3"], "--baseline: "),
        (["--baseline-tokens", "0"], "--baseline-tokens: 0; expected a whole number of at least 1"),
        (["--port", "70000"], "--port: 70000; expected a number from 0 (any that is free) to 65535"),
        (["--queue", "0"], "--queue: 0; expected a whole number of at least 1"),
        (["--host", "::1"], "--host: ::1; expected a name or IPv4 address of this machine"),
        (
            ["--host", "no.such.host.invalid"],
            "--host: no.such.host.invalid; expected a name or IPv4 address of this machine",
        ),
        (["--max-new-tokens", "-1"], "max_new_tokens: -1; expected"),
        (["--fps", "-1"], "fps: -1.0; expected"),
    ],
)
def test_mistakes(
    flags: list[str], message: str, folder: Path, video: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(video), "--checkpoint", str(folder), "--port", "0", *flags]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_a_source_or_a_model_that_cannot_be_shown(
    folder: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hybridvl.save(VisionLanguageModel(small_config("gdn*2", vision=None)), tmp_path / "text")
    blind = f"{tmp_path / 'text'}: a model without a vision tower; expected one that can look at frames"
    for command, message in (
        ([str(tmp_path / "none.mp4"), "--checkpoint", str(folder)], "no such file"),
        ([str(video), "--checkpoint", str(tmp_path / "text")], blind),
        ([str(video), "--checkpoint", str(folder), "--baseline", str(tmp_path / "text")], blind),
        ([str(video), "--checkpoint", str(tmp_path)], "neither config.json nor model/config.json in it"),
    ):
        assert main(["serve", *command, "--port", "0"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1


def test_a_port_that_is_taken(folder: Path, video: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", str(video), "--checkpoint", str(folder), "--port", str(port)]) == 2
    wanted = f"--host, --port: 127.0.0.1, {port}: Address already in use; expected"
    assert capsys.readouterr().err.startswith(f"error: {wanted}")


def test_the_source_is_named_without_its_password_and_without_commands() -> None:
    found = [_shown_source(name) for name in ("rtsp://eve:secret@host/x", "a\x1b[31m\udcff.mp4", "C:/clip.mp4")]
    assert found == ["rtsp://eve:***@host/x", "a\N{REPLACEMENT CHARACTER}[31m?.mp4", "C:/clip.mp4"]


def test_without_gradio(
    folder: Path, video: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["serve", str(video), "--checkpoint", str(folder), "--port", "0"]) == 2
    assert capsys.readouterr().err == 'error: serve: gradio is not installed; pip install "hybridvl[serve]"\n'


def test_every_flag_is_on_the_page_of_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--help"]) == 0
    flags = set(re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.MULTILINE))
    assert {"--baseline", "--loop"} <= flags
    assert flags <= set(re.findall(r"--[\w-]+", PAGE))
