"""Streams on disk: one that was stopped, and gone on with in another process, is one that was never stopped."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from streaming_cases import equal_states, first_logits, frames_of, reply, stream_model, stream_processor

import hybridvl
from hybridvl.checkpoints.fingerprint import fingerprint
from hybridvl.inference.streaming import StreamingSession
from hybridvl.layers import ConfigError

MODEL, PROCESSOR = stream_model("swa gdn mamba2 full"), stream_processor()

TESTS = Path(__file__).parents[1]
GO_ON = """
import sys
import torch
import hybridvl
from hybridvl.inference import Processor
from hybridvl.inference.streaming import StreamingSession
from streaming_cases import frames_of

folder, before, after = sys.argv[1:]
session = StreamingSession.load(before, hybridvl.load(folder), Processor.load(folder))
for number, frame in enumerate(frames_of(8, 7)[4:], 4):
    session.push(frame, number / 2)
session.save(after)
print("".join(piece.text for piece in session.ask("What?", 8)), end="")
"""


def started(layout: str, together: int, count: int = 4) -> StreamingSession:
    session = StreamingSession(MODEL, PROCESSOR, layout, together)
    session.say("Ähre <|im_end|>")
    for number, frame in enumerate(frames_of(8, count)):
        session.push(frame, number / 2)
    return session


@pytest.mark.parametrize(("layout", "together"), [("video", 1), ("images", 1)])
def test_another_process_goes_on_to_the_last_bit(layout: str, together: int, tmp_path: Path) -> None:
    folder, before, after = tmp_path / "model", tmp_path / "before.safetensors", tmp_path / "after.safetensors"
    hybridvl.save(MODEL, folder)
    PROCESSOR.save(folder)
    started(layout, together).save(before)
    command = [sys.executable, "-c", GO_ON, str(folder), str(before), str(after)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS, env=environment())
    assert done.returncode == 0, done.stderr
    never_stopped = started(layout, together, 7)
    assert equal_states(StreamingSession.load(after, MODEL, PROCESSOR), never_stopped)
    assert done.stdout == reply(never_stopped, "What?", 8)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}


def test_frames_and_texts_that_wait_are_kept(tmp_path: Path) -> None:
    session = started("video", 2, 3)
    session.save(tmp_path / "stream")
    loaded = StreamingSession.load(tmp_path / "stream", MODEL, PROCESSOR)
    assert equal_states(loaded, session)
    assert [frame.shape for frame in loaded.steps.waiting()[0]] == [(56, 84, 3)]
    for number, frame in enumerate(frames_of(9, 4)):
        session.push(frame, 5.0 + number)
        loaded.push(frame, 5.0 + number)
    session.say("A")
    loaded.say("A")
    session.save(tmp_path / "stream")
    loaded = StreamingSession.load(tmp_path / "stream", MODEL, PROCESSOR)
    assert equal_states(loaded, session)
    assert torch.equal(first_logits(loaded, "?"), first_logits(session, "?"))


def test_limits_are_kept(tmp_path: Path) -> None:
    session = StreamingSession(MODEL, PROCESSOR, limits=(784, 1568))
    session.push(*frames_of(1, 1))
    session.save(tmp_path / "stream")
    loaded = StreamingSession.load(tmp_path / "stream", MODEL, PROCESSOR)
    (frame,) = frames_of(2, 1)
    session.push(frame)
    loaded.push(frame)
    assert equal_states(loaded, session)


def changed(path: Path, target: Path, **metadata: str) -> Path:
    with safe_open(path, "pt") as file:
        kept = file.metadata()
    save_file(load_file(path), target, {**kept, **metadata})
    return target


def test_what_is_no_stream_of_this_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    started("video", 1).save(path)
    other = stream_model("swa gdn mamba2 full")
    StreamingSession.load(path, other, PROCESSOR)  # equal weights
    with torch.no_grad():
        other.decoder.norm.weight[3] += 1e-3
    theirs, own = fingerprint(MODEL), fingerprint(other)
    cases = {
        rf"written with the checkpoint {theirs[:12]}\.\.\., the model given is {own[:12]}\.\.\.; expected the same": (
            path,
            other,
        ),
        r"version '2'; expected 1$": (changed(path, tmp_path / "version", version="2"), MODEL),
        r"format None; expected a stream, 'hybridvl-stream'$": (weights(tmp_path / "weights"), MODEL),
        r"it is damaged: 'steps'$": (changed(path, tmp_path / "lacks", stream='{"timeline": {}}'), MODEL),
        r"it is damaged: Expecting value": (changed(path, tmp_path / "text", stream="?"), MODEL),
        r"no such file; expected what hybridvl stream --save-state": (tmp_path / "nothing", MODEL),
        r"it is damaged: .*": (truncated(path, tmp_path / "short"), MODEL),
    }
    for message, (file, model) in cases.items():
        with pytest.raises(ConfigError, match=rf"^{file}: {message}"):
            StreamingSession.load(file, model, PROCESSOR)


def weights(path: Path) -> Path:
    save_file({"x": torch.zeros(3)}, path)
    return path


def truncated(path: Path, target: Path) -> Path:
    target.write_bytes(path.read_bytes()[:-8])
    return target


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("timeline", "position", "a"),
        ("timeline", "position", -1),
        ("timeline", "ids", [99_999]),
        ("timeline", "ids", None),
        ("timeline", "layout", "film"),
        ("timeline", "rate", 3.0),
        ("timeline", "text", 5),
        ("timeline", "time", float("nan")),
        ("timeline", "video", {"origin": None, "began": 0.0, "step": 1}),
        ("timeline", "further", 1),
        ("steps", "limits", [1, 2, 3]),
        ("steps", "together", 3),
    ],
)
def test_a_record_that_cannot_be_is_damage(part: str, name: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "stream"
    started("video", 2, 3).save(path)
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["stream"])
    StreamingSession.load(changed(path, tmp_path / "same", stream=json.dumps(record)), MODEL, PROCESSOR)
    assert record[part].get(name, "nothing") != value
    record[part][name] = value
    wrong = changed(path, tmp_path / "wrong", stream=json.dumps(record))
    with pytest.raises(ConfigError, match=rf"^{wrong}: it is damaged: "):
        StreamingSession.load(wrong, MODEL, PROCESSOR)


def test_frames_that_cannot_wait_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    started("video", 2, 3).save(path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    frame = tensors["waiting.0"]
    for wrong in ({"waiting.0": frame.float()}, {"waiting.0": frame[:5, :7].clone()}, {"waiting.1": frame.clone()}):
        save_file({**tensors, **wrong}, tmp_path / "wrong", metadata)
        with pytest.raises(ConfigError, match=r"it is damaged: \d frames of "):
            StreamingSession.load(tmp_path / "wrong", MODEL, PROCESSOR)


def test_a_state_of_another_shape_is_damage(tmp_path: Path) -> None:
    path, tensors = tmp_path / "stream", {}
    started("video", 1).save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
    tensors["layers.0.k"] = tensors["layers.0.k"][:, :-1].contiguous()
    save_file(tensors, path, metadata)
    with pytest.raises(ConfigError, match=r"it is damaged: state tensor k: saved "):
        StreamingSession.load(path, MODEL, PROCESSOR)


def test_the_record_is_plain_json(tmp_path: Path) -> None:
    started("video", 1).save(tmp_path / "stream")
    with safe_open(tmp_path / "stream", "pt") as file:
        metadata = file.metadata()
    assert metadata["checkpoint"] == fingerprint(MODEL)
    timeline = json.loads(metadata["stream"])["timeline"]
    assert (timeline["frames"], timeline["time"], timeline["layout"]) == (4, 1.5, "video")


def test_fingerprints_tell_weights_options_and_dtypes_apart() -> None:
    kinds = {
        "same": stream_model("swa gdn mamba2 full"),
        "pattern": stream_model("swa gdn mamba2 swa"),
        "convention": stream_model("swa gdn mamba2 full", "v523"),
        "dtype": stream_model("swa gdn mamba2 full").bfloat16(),
    }
    found = {name: fingerprint(model) for name, model in kinds.items()}
    assert found["same"] == fingerprint(MODEL)
    assert len(set(found.values())) == len(kinds)


def test_weights_made_for_inference_alone_are_told_apart_too(tmp_path: Path) -> None:
    with torch.inference_mode():
        model = copy.deepcopy(MODEL)
        assert all(weight.is_inference() for weight in model.parameters())
        session = StreamingSession(model, PROCESSOR)
        session.push(frames_of(0, 1)[0])
        session.save(tmp_path / "stream")
        next(model.parameters()).mul_(2)
        with pytest.raises(ConfigError, match="expected the same weights"):
            StreamingSession.load(tmp_path / "stream", model, PROCESSOR)
