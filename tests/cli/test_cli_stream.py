"""`hybridvl stream`: real video files shown to a model; what it prints, logs and keeps is what a session gives."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from streaming_cases import equal_states, kept, reply, saved_model, session_of
from video_cases import decode_all, write_video
from waiting import wait_until

import hybridvl
from hybridvl.cli import computing, main
from hybridvl.cli.computing import use_threads
from hybridvl.inference import Processor
from hybridvl.inference.streaming import StreamingSession


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("streams") / "model")


@pytest.fixture(scope="module")
def video(folder: Path) -> Path:
    """12 frames, 4 a second; the processor shows one a second."""
    return write_video(folder.parent / "bars.mp4", frames=12, rate=4)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_replies_log_and_state_are_those_of_a_session(
    folder: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, log = tmp_path / "state", tmp_path / "log.jsonl"
    flags = ["--max-new-tokens", "5", "--log", str(log), "--save-state", str(state)]
    cues = ["--ask", "end:Last?", "--ask", "1.2s:Now?", "--say", "0.5:A b.", "--say", "start:Look!"]
    assert main(["stream", str(video), "--checkpoint", str(folder), *flags, *cues]) == 0
    frames = [(decode_all(video)[number], number / 4) for number in (0, 4, 8)]
    session = session_of(folder, [])
    session.say("Look!")
    session.push(*frames[0])
    session.say("A b.")
    session.push(*frames[1])
    first = reply(session, "Now?", 5)
    session.push(*frames[2])
    last = reply(session, "Last?", 5)
    assert equal_states(kept(state, session), session)
    shown = capsys.readouterr()
    assert shown.out == f"[1.0 s] Now?\n{first}\n[2.0 s] Last?\n{last}\n"
    assert shown.err.startswith("3 frames to 2.0 s, ")
    assert shown.err.endswith(f"state {session.state_bytes:,} bytes\nstate        {state}\n")
    one, two, end = lines(log)
    assert (one["question"], one["reply"], one["asked"], one["time"], one["frames"]) == ("Now?", first, 1.2, 1.0, 2)
    assert (two["question"], two["reply"], two["asked"], two["late"]) == ("Last?", last, "end", False)
    assert (end["event"], end["frames"], end["dropped"]) == ("end", 3, 0)
    assert end["tokens"] == session.timeline.tokens
    assert 0 < end["seconds_per_frame"]["vision"] < end["seconds"]
    assert end["frames_per_second"] == pytest.approx(3 / end["seconds"])


def test_a_kept_stream_goes_on_with_another_source(folder: Path, video: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    shown = [np.full((56, 28, 3), 40 * number, np.uint8) for number in range(3)]
    for number, picture in enumerate(shown):
        Image.fromarray(picture).save(pictures / f"{number}.png")
    first, second = tmp_path / "first", tmp_path / "second"
    common = ["--checkpoint", str(folder), "--quiet"]
    images = ["--layout", "images", "--max-frames", "2", "--fps", "2"]
    assert main(["stream", str(video), *common, *images, "--save-state", str(first)]) == 0
    assert main(["stream", str(pictures), *common, "--load-state", str(first), "--save-state", str(second)]) == 0
    # One picture a second, the first of them a second after the last frame.
    frames = [(decode_all(video)[0], 0.0), (decode_all(video)[2], 0.5)]
    frames += [(picture, 1.5 + number) for number, picture in enumerate(shown)]
    session = session_of(folder, frames, "images")
    assert equal_states(kept(second, session), session)


def test_two_frames_in_a_step(folder: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is said and asked while a frame waits for the second of its step comes after that frame."""
    state, cues = tmp_path / "state", ["--say", "0.6s:A b.", "--ask", "1.1s:Now?", "--max-new-tokens", "3"]
    command = ["stream", str(video), "--checkpoint", str(folder), "--together", "2", "--fps", "2"]
    assert main([*command, *cues, "--max-frames", "5", "--save-state", str(state)]) == 0
    session = StreamingSession(hybridvl.load(folder).eval(), Processor.load(folder), together=2)
    frames = decode_all(video)
    for number in range(5):
        session.push(frames[2 * number], number / 2)
        if number == 1:
            session.say("A b.")
        if number == 2:
            wanted = reply(session, "Now?", 3)
    assert capsys.readouterr().out == f"[1.0 s] Now?\n{wanted}\n"
    assert equal_states(kept(state, session), session)
    assert len(kept(state, session).steps.waiting()[0]) == 1
    # Another source goes on after the frame that waits.
    assert main([*command[:4], "--fps", "1", "--load-state", str(state), "--save-state", str(state)]) == 0
    for number in range(3):
        session.push(frames[4 * number], 3.0 + number)
    assert equal_states(kept(state, session), session)


def test_a_mistake_leaves_a_kept_stream_as_it_is(folder: Path, video: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    command = ["stream", str(video), "--checkpoint", str(folder), "--save-state", str(state)]
    assert main([*command, "--max-frames", "2"]) == 0
    before = state.read_bytes()
    assert main([*command, "--queue", "0"]) == 2
    assert main([*command, "--together", "0"]) == 2
    assert state.read_bytes() == before


def test_limits_of_a_frame(folder: Path, video: Path, tmp_path: Path) -> None:
    for flags, tokens in (("--max-pixels 784", 1), ("--min-pixels 3136", 4), ("--max-pixels 800 --min-pixels 784", 1)):
        state = tmp_path / flags.replace(" ", "")
        command = ["stream", str(video), "--checkpoint", str(folder), "--max-frames", "1", *flags.split()]
        assert main([*command, "--save-state", str(state)]) == 0
        session = kept(state, session_of(folder, []))
        opening = session.processor.chat.turn_opening()
        assert (
            session.timeline.tokens - tokens == len(opening[0]) + len(session.processor.chat.text_ids(opening[1])) + 1
        )


def test_a_question_after_the_end_is_answered_there(
    folder: Path, video: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["stream", str(video), "--checkpoint", str(folder), "--max-new-tokens", "1"]
    assert main([*command, "--ask", "60s:Hm?", "--say", "70s:Late"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("[2.0 s] Hm?\n")
    assert shown.err.startswith("warning: asked for 60 s: the stream ended at 2 s\n")
    assert "\nwarning: not said for 70 s: the stream ended at 2 s\n" in shown.err


def test_a_source_that_breaks_off_leaves_what_was_shown(
    folder: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut, state, log = tmp_path / "cut.mp4", tmp_path / "state", tmp_path / "log.jsonl"
    whole = write_video(tmp_path / "whole.mp4", frames=40, rate=4, options={"movflags": "faststart"})
    data = whole.read_bytes()
    cut.write_bytes(data[: len(data) * 3 // 4])
    command = ["stream", str(cut), "--checkpoint", str(folder), "--save-state", str(state), "--log", str(log)]
    assert main([*command, "--max-new-tokens", "3", "--ask", "end:What now?"]) == 2
    shown = capsys.readouterr()
    error = shown.err.splitlines()[-1]
    assert error.startswith(f"error: SOURCE: video {cut}")
    end = lines(log)[-1]
    assert 0 < end["frames"] < 10
    frames = [(decode_all(whole)[4 * number], float(number)) for number in range(end["frames"])]
    session = session_of(folder, frames)
    assert equal_states(kept(state, session), session)
    assert shown.out == f"[{frames[-1][1]:.1f} s] What now?\n{reply(session, 'What now?', 3)}\n"


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_keep_the_stream(ending: signal.Signals, folder: Path, video: Path, tmp_path: Path) -> None:
    state, log = tmp_path / "state", tmp_path / "log.jsonl"
    command = [sys.executable, "-m", "hybridvl", "stream", str(video), "--checkpoint", str(folder)]
    command += ["--realtime", "--ask", "0.5:Now?", "--log", str(log), "--save-state", str(state)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    wait_until(log.exists)  # the question has been answered; the video goes on for two seconds
    started.send_signal(ending)
    _, errors = started.communicate(timeout=60)
    assert started.returncode == 130
    assert errors.splitlines()[-1] == "error: stream interrupted"
    frames = [(decode_all(video)[4 * number], float(number)) for number in range(lines(log)[-1]["frames"])]
    assert 1 <= len(frames) < 3
    session = session_of(folder, frames)
    assert equal_states(kept(state, session), session)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--ask", "now:What?"],
            '--ask: \'now:What?\'; expected a time and a text, such as 12.5s:"TEXT", start:"TEXT" or end:"TEXT"',
        ),
        (["--say", "3s:"], "--say: '3s:'; expected a time and a text"),
        (["--max-frames", "0"], "--max-frames: 0; expected a whole number of at least 1"),
        (["--fps", "-1"], "fps: -1.0; expected"),
        (["--together", "3"], "together: 3; expected 1 or 2 frames a step"),
        (["--max-pixels", "10", "--min-pixels", "20"], "min_pixels and max_pixels: 20 and 10; expected 0 < min <= max"),
        (["--queue", "0"], "--queue: 0; expected a whole number of at least 1"),
        (["--max-new-tokens", "-1"], "max_new_tokens: -1; expected"),
        (["--load-state", "nothing"], "nothing: no such file; expected what hybridvl stream --save-state"),
        (["--load-state", "x", "--layout", "video"], "--layout: given with --load-state; expected one of them"),
        (["--log", "."], ".: is a folder; expected the name of a file to write"),
        (["--timeout", "0"], "live.timeout: 0.0; expected seconds"),
        (["--threads", "0"], "--threads: 0; expected 1 to 1024"),
    ],
)
def test_mistakes(
    flags: list[str], message: str, folder: Path, video: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stream", str(video), "--checkpoint", str(folder), *flags]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_threads_and_why_there_are_no_graphs(folder: Path, video: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where they were asked for; nothing is said where not, and nothing becomes another reply."""
    flags, before = ["stream", str(video), "--checkpoint", str(folder), "--ask", "end:What?"], torch.get_num_threads()
    told, wanted = [], 1 + before % 2  # another number than before
    try:
        for more in ([], ["--graphs", "auto"], ["--graphs", "off", "--threads", str(wanted)]):
            assert torch.get_num_threads() == before
            assert main([*flags, *more]) == 0
            told.append(capsys.readouterr())
        assert torch.get_num_threads() == wanted
    finally:
        torch.set_num_threads(before)
    assert len({shown.out for shown in told}) == 1
    assert [len(shown.err.splitlines()) for shown in told] == [1, 2, 1]
    assert told[1].err.splitlines()[1] == "no CUDA graphs: the model is on the device 'cpu'"


def test_a_thread_that_reads_has_a_core_where_there_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    options, before = argparse.Namespace(threads=None), torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    try:
        for cores, has, wanted in ((4, 4, 3), (4, 3, 3), (8, 4, 4), (2, 2, 2), (1, 1, 1)):
            monkeypatch.setattr(computing, "usable_cores", lambda cores=cores: cores)
            torch.set_num_threads(has)
            use_threads(options)
            assert torch.get_num_threads() == has
            use_threads(options, reading=True)
            assert torch.get_num_threads() == wanted
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
        monkeypatch.setattr(computing, "usable_cores", lambda: 4)
        torch.set_num_threads(4)
        use_threads(options, reading=True)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_sources_that_are_none(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, text = tmp_path / "empty.mp4", tmp_path / "text.mp4"
    empty.touch()
    text.write_text("no video\n" * 100)
    cases = {str(tmp_path / "none.mp4"): "no such file", str(empty): "it is empty", str(text): ""}
    for source, reason in cases.items():
        assert main(["stream", source, "--checkpoint", str(folder)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: SOURCE: video {source}")
        assert reason in error
    assert main(["stream", str(text), "--checkpoint", str(tmp_path)]) == 2
    assert "neither config.json nor model/config.json in it" in capsys.readouterr().err
