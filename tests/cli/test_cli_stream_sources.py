"""`hybridvl stream` of what real videos are like: uneven times, turned, of odd sizes, with sound alone, found again."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
from stream_server import serving
from streaming_cases import equal_states, kept, reply, saved_model, session_of
from video_cases import decode_all, write_timed, write_video

from hybridvl.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("streams") / "model")


def uneven(path: Path) -> tuple[np.ndarray, list[float]]:
    times = np.cumsum([0, 40, 40, 200, 30, 500, 33, 34, 1000, 40])
    write_timed(path, times.tolist(), options={"bf": "3", "b-adapt": "0"})
    return decode_all(path), (times / 1000).tolist()


def turned(path: Path) -> tuple[np.ndarray, list[float]]:
    write_video(path, 6, 5, matrix=90)
    return np.ascontiguousarray(np.rot90(decode_all(path), axes=(1, 2))), [number / 5 for number in range(6)]


def odd(path: Path) -> tuple[np.ndarray, list[float]]:
    """Of noise, so that each row and column counts, and the place that it has."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=5, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = 67, 49, "yuv444p"
        for _ in range(6):
            pixels = rng.integers(0, 256, (49, 67, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return decode_all(path), [number / 5 for number in range(6)]


@pytest.mark.parametrize("make", [uneven, turned, odd])
def test_what_is_shown_is_what_the_file_holds(make, folder: Path, tmp_path: Path) -> None:
    frames, times = make(tmp_path / "clip.mp4")
    state = tmp_path / "state"
    command = ["stream", str(tmp_path / "clip.mp4"), "--checkpoint", str(folder), "--fps", "0", "--quiet"]
    assert main([*command, "--save-state", str(state)]) == 0
    wanted = session_of(folder, zip(frames, times, strict=True))
    assert equal_states(kept(state, wanted), wanted)


def test_sound_alone_is_refused_in_a_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, state = tmp_path / "sound.mp4", tmp_path / "state"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    assert main(["stream", str(path), "--checkpoint", str(folder), "--save-state", str(state)]) == 2
    wanted = f"SOURCE: video {path} cannot be read: it holds no video (format mov,mp4,m4a,3gp,3g2,mj2)"
    assert capsys.readouterr().err == f"error: {wanted}\n"
    assert not state.exists()


def test_a_stream_that_drops_is_found_again_and_its_state_kept(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = write_video(tmp_path / "a.ts", 10, 5), write_video(tmp_path / "b.ts", 6, 5, size=(96, 80))
    state, log = tmp_path / "state", tmp_path / "log"
    with serving([clips[0].read_bytes(), clips[1].read_bytes(), None]) as server:
        command = ["stream", server.url, "--checkpoint", str(folder), "--fps", "0", "--tries", "1", "--drop", "never"]
        command += ["--save-state", str(state), "--log", str(log), "--ask", "end:What?", "--max-new-tokens", "3"]
        assert main(command) == 2
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-1].startswith(f"error: SOURCE: stream {server.url} was lost after 16 frames")
    answered, end = map(json.loads, log.read_text().splitlines())
    assert (end["frames"], end["reconnects"], end["dropped"]) == (16, 1, 0)
    found = kept(state, session_of(folder, []))
    resumed = found.timeline.time - 1.0  # how long the break was only the clock knows
    times = [*(number / 5 for number in range(10)), *(resumed + number / 5 for number in range(6))]
    session = session_of(folder, zip([*decode_all(clips[0]), *decode_all(clips[1])], times, strict=True))
    assert resumed > 1.8
    assert {name: session.timeline.record()[name] for name in ("position", "frames", "tokens")} == {
        name: found.timeline.record()[name] for name in ("position", "frames", "tokens")
    }
    tensors = zip(session.state.tensors().values(), found.state.tensors().values(), strict=True)
    assert all((one == two).all() for one, two in tensors)
    assert answered["reply"] == reply(session, "What?", 3)
