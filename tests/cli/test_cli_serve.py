"""`hybridvl serve`: mistakes told before a model is loaded, the baseline's limit, and the end of the command."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from model_cases import small_config
from served_pages import clip, served
from streaming_cases import saved_model
from video_cases import write_video

import hybridvl
from hybridvl.cli import main
from hybridvl.cli.serve import _shown_source
from hybridvl.models.vlm import VisionLanguageModel

PAGE = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")

SUMMARY = re.compile(
    r"(.*): ([\d,]+) frames, (?:[\d.,]+ ms a frame at the end, )?([\d,]+) tokens, state ([\d,]+) bytes"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("serve") / "model")


@pytest.fixture(scope="module")
def video(folder: Path) -> Path:
    return clip(folder.parent)


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


def test_a_source_that_breaks_off_is_told_at_the_end(folder: Path, video: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.mp4"
    whole = write_video(tmp_path / "whole.mp4", frames=40, rate=4, options={"movflags": "faststart"}).read_bytes()
    cut.write_bytes(whole[: len(whole) * 3 // 4])
    for patience in (2, 8, 32):  # seconds; it has some seven frames of a few milliseconds
        with served(str(cut), "--checkpoint", str(folder), "--no-baseline") as (_, process):
            time.sleep(patience)
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        if "error:" in errors:
            break
    summary, error = errors.splitlines()
    assert 0 < int(SUMMARY.fullmatch(summary)[2]) < 40
    assert error.startswith(f"error: SOURCE: video {cut} cannot be read on after ")


# The command, with a frame that takes for ever when it is to end.
STUCK = """
import sys, time
from hybridvl.cli import main
from hybridvl.inference.streaming.side_by_side import SideBySide

SideBySide.close = lambda self: (print("closing", flush=True), time.sleep(600))
sys.exit(main(sys.argv[1:]))
"""


def test_a_second_signal_ends_it_at_once(folder: Path, video: Path) -> None:
    command = [sys.executable, "-c", STUCK, "serve", str(video), "--checkpoint", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline().endswith("; Ctrl-C ends it\n")
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "closing\n"
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, errors) == (130, "error: serve interrupted\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--baseline", "fool*2"], "--baseline: layer pattern, column 1: unknown mixer 'fool', did you mean 'full'?"),
        (["--baseline", "full*3"], "--baseline: "),
        (["--baseline-tokens", "0"], "--baseline-tokens: 0; expected a whole number of at least 1"),
        (["--port", "70000"], "--port: 70000; expected a number from 0 (any that is free) to 65535"),
        (["--queue", "0"], "--queue: 0; expected a whole number of at least 1"),
        (["--host", "::1"], "--host: ::1; expected a name or IPv4 address of this machine"),
        (["--host", "a..b"], "--host: a..b; expected a name or IPv4 address of this machine"),
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
    told = 'gradio is not installed; pip install -c constraints.txt -e ".[serve]"'
    assert capsys.readouterr().err == f"error: serve: {told}\n"


def test_every_flag_is_on_the_page_of_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--help"]) == 0
    flags = set(re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.MULTILINE))
    assert {"--baseline", "--loop"} <= flags
    assert flags <= set(re.findall(r"--[\w-]+", PAGE))
