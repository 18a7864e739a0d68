"""A public clip, the film of the turning earth that comes with gradio, is streamed frame by frame as it is decoded."""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path

import av
import pytest
from streaming_cases import equal_states, kept, reply, saved_model, session_of

from hybridvl.cli import main

EVERY = 60  # frames of the clip, which has 30 a second


def clip() -> Path:
    # Of the dev extra; found without importing it.
    return Path(distribution("gradio").locate_file("gradio/media_assets/videos/world.mp4"))


def test_a_public_clip_streams_as_it_is_decoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, folder, state = clip(), saved_model(tmp_path / "model"), tmp_path / "state"
    flags = ["--fps", "0.5", "--max-new-tokens", "5", "--save-state", str(state)]
    assert main(["stream", str(path), "--checkpoint", str(folder), *flags, "--ask", "end:What turns?"]) == 0
    session = session_of(folder, [])
    sizes = set()
    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number % EVERY == 0:
                pixels = frame.to_ndarray(format="rgb24")
                sizes.add(pixels.shape)
                session.push(pixels, number / 30)
    assert sizes == {(270, 480, 3)}
    assert session.timeline.frames == 16
    assert equal_states(kept(state, session), session)
    said, told = capsys.readouterr()
    assert said == f"[30.0 s] What turns?\n{reply(session, 'What turns?', 5)}\n"
    assert told.startswith("16 frames to 30.0 s, ")
