"""Streams: frames one by one are one video, forks and questions leave no trace, mistakes are told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from model_cases import relative_error
from streaming_cases import (
    LIMITS,
    equal_states,
    first_logits,
    frames_of,
    out_of_memory,
    stream_model,
    stream_processor,
    text,
)

from hybridvl.inference import Sampling, stream_replies
from hybridvl.inference.streaming import StreamingSession
from hybridvl.layers import ConfigError

MODEL, PROCESSOR = stream_model(), stream_processor()
TOLERANCE = 2e-5


def image(frame: np.ndarray) -> dict:
    return {"type": "image", "image": frame}


@pytest.mark.parametrize("convention", ["v457", "v523"])
@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_frames_one_by_one_are_one_video(count: int, together: int, convention: str) -> None:
    """With two frames in a step, a video file's; with one, a video in which each is there twice."""
    model, frames = stream_model("swa gdn", convention), frames_of(count, count)
    session = StreamingSession(model, PROCESSOR, "video", together)
    for number, frame in enumerate(frames):
        session.push(frame, float(number))
    shown = [frame for frame in frames for _ in range(3 - together)]
    video = {"type": "video", "video": shown, "fps": 3.0 - together}
    inputs = PROCESSOR.prompt([{"role": "user", "content": [video, text("How many?")]}])
    grids = {name: inputs[name] for name in ("video_grid_thw", "second_per_grid_ts")}
    positions, _ = model.rope_positions(inputs["input_ids"], **grids)
    # The text after a video goes on past it, where "v523" would have it begin beside the frames.
    words = int((inputs["input_ids"][0] == 4).nonzero()[-1])  # <|vision_end|>
    positions[:, :, words:] = positions[:, :, :words].max() + 1 + torch.arange(positions.shape[2] - words)
    with torch.no_grad():
        wanted = model(**inputs, position_ids=positions).logits[0, -1]
    assert relative_error(first_logits(session, "How many?"), wanted) < TOLERANCE


def test_replies_are_those_to_the_whole_conversation() -> None:
    session, frames = StreamingSession(MODEL, PROCESSOR, "images"), frames_of(3, 4)
    session.say("Four pictures. ")
    for frame in frames:
        session.push(frame)
    found = list(session.ask("What was the second?", 12))
    parts = [text("Four pictures. "), *map(image, frames), text("What was the second?")]
    inputs = PROCESSOR.prompt([{"role": "user", "content": parts}])
    wanted = list(stream_replies(MODEL, PROCESSOR, inputs, 12))
    assert [(piece.text, piece.finish_reason) for piece in found] == [
        (piece.text, piece.finish_reason) for piece in wanted
    ]
    assert "".join(piece.text for piece in found)
    assert found[-1].rates.state_bytes == session.state_bytes


def test_a_stream_goes_on_while_a_question_is_answered() -> None:
    session, alone = StreamingSession(MODEL, PROCESSOR), StreamingSession(MODEL, PROCESSOR)
    frames = frames_of(0, 6)
    for frame in frames[:3]:
        session.push(frame)
        alone.push(frame)
    sampling = Sampling(temperature=1.0, seed=3)
    wanted = "".join(piece.text for piece in alone.ask("What?", 9, sampling))
    reply = session.ask("What?", 9, sampling)
    found = next(reply).text
    for frame in frames[3:]:
        session.push(frame)
        alone.push(frame)
    found += "".join(piece.text for piece in reply)
    assert found == wanted
    assert equal_states(session, alone)


def test_forks_go_separate_ways() -> None:
    session = StreamingSession(MODEL, PROCESSOR, together=2)
    first, second, third = frames_of(1, 3)
    session.push(first)
    fork = session.fork()
    fork.push(second)
    session.push(third)
    assert not torch.equal(first_logits(fork, "?"), first_logits(session, "?"))
    for own, frame in ((fork, second), (session, third)):
        alone = StreamingSession(MODEL, PROCESSOR, together=2)
        alone.push(first)
        alone.push(frame)
        assert equal_states(own, alone)


def test_reset_begins_anew() -> None:
    session, fresh = (StreamingSession(MODEL, PROCESSOR, together=2) for _ in range(2))
    for frame in frames_of(5, 3):
        session.push(frame)
    buffers = [tensor.data_ptr() for tensor in session.state.tensors().values()]
    session.reset()
    assert equal_states(session, fresh)
    assert [tensor.data_ptr() for tensor in session.state.tensors().values()] == buffers
    for frame in frames_of(6, 4):
        session.push(frame)
        fresh.push(frame)
    assert equal_states(session, fresh)


def test_the_state_is_as_large_as_planned_and_does_not_grow() -> None:
    session = StreamingSession(MODEL, PROCESSOR)
    config = MODEL.config
    wanted = sum(mixer.state_bytes(10_000, torch.float32, config.width) for mixer in MODEL.mixer_configs)
    counters = 2 * 8  # tokens seen, and how far positions are behind them
    for frame in frames_of(2, 12):
        session.push(frame)
        assert session.state_bytes == wanted + counters
    assert session.timeline.tokens == int(session.state.length) > 12 * 6


def test_what_cannot_be_a_stream() -> None:
    with pytest.raises(ConfigError, match=r"^layout: 'film'; expected one of video, images$"):
        StreamingSession(MODEL, PROCESSOR, "film")
    with pytest.raises(ConfigError, match=r"^together: 3; expected 1 or 2 frames a step$"):
        StreamingSession(MODEL, PROCESSOR, together=3)
    with pytest.raises(ConfigError, match=r"^min_pixels and max_pixels: 900 and 800; expected 0 < min <= max$"):
        StreamingSession(MODEL, PROCESSOR, limits=(900, 800))
    session = StreamingSession(MODEL, PROCESSOR, limits=LIMITS)
    frame, *_ = frames_of(0, 1)
    session.push(frame, 2.5)
    before = session.fork()
    with pytest.raises(ConfigError, match=r"^time: 2\.25; expected seconds of at least 2\.5, the time of"):
        session.push(frame, 2.25)
    with pytest.raises(ConfigError, match=r"^time: nan; expected seconds"):
        session.push(frame, float("nan"))
    with pytest.raises(ConfigError, match=r"^frame 1: "):
        session.push(b"no picture", 3.0)
    with pytest.raises(ConfigError, match=r"^time: 1e\+19; expected seconds"):
        session.push(frame, 1e19)
    with pytest.raises(ConfigError, match=r"^text: '\\ud800'; expected a text$"):
        session.say("\ud800")
    with pytest.raises(ConfigError, match=r"^text: 5; expected a text$"):
        session.ask(5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^max_new_tokens: -1; expected a whole number of at least 0$"):
        session.ask("?", -1)
    assert equal_states(session, before)


def test_without_times_frames_follow_at_the_rate_of_videos() -> None:
    """Also where two make a step: its time is that of the first, and the next frame comes after the second."""
    session, timed = (StreamingSession(MODEL, PROCESSOR, together=2) for _ in range(2))
    for number, frame in enumerate(frames_of(4, 7)):
        session.push(frame)
        timed.push(frame, float(number))
    assert equal_states(session, timed)
    assert session.timeline.time == 4.0
    assert session.after_last == 7.0


def test_a_frame_that_would_wait_is_refused_at_a_time_that_cannot_be() -> None:
    session = StreamingSession(MODEL, PROCESSOR, together=2)
    first, second = frames_of(4, 2)
    session.push(first, 0.0)
    for wrong in (float("nan"), -1.0):
        with pytest.raises(ConfigError, match=r"^time: "):
            session.push(second, wrong)
    session.push(second, 10.0)
    with pytest.raises(
        ConfigError, match=r"^time: 9\.0; expected seconds of at least 10, the time of the frame before$"
    ):
        session.push(first, 9.0)
    assert (session.timeline.frames, len(session.steps.waiting()[0])) == (1, 0)


def test_an_empty_question_ends_the_video_and_an_empty_text_nothing() -> None:
    session = StreamingSession(MODEL, PROCESSOR, together=2)
    for frame in frames_of(4, 3):
        session.push(frame)
    before = session.fork()
    session.say("")
    assert equal_states(session, before)
    assert len(session.steps.waiting()[0]) == 1
    end = PROCESSOR.chat.visual_ids()[1]
    assert session.timeline.copy().question("").before == [end, *PROCESSOR.chat.turn_closing()]


def test_a_torn_state_is_not_gone_on_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Memory may run out, or Ctrl-C come, when some layers have seen a frame and others have not."""
    session, fresh = (StreamingSession(MODEL, PROCESSOR) for _ in range(2))
    first, second = frames_of(4, 2)
    session.push(first, 0.0)
    timeline = session.timeline.record()
    with monkeypatch.context() as patch:
        patch.setattr(MODEL.decoder.layers[1], "forward", out_of_memory)
        with pytest.raises(MemoryError):
            session.push(second, 1.0)
    assert session.timeline.record() == timeline
    assert not session.whole
    calls = (lambda: session.push(second, 2.0), lambda: session.ask("?"), lambda: session.save(tmp_path / "stream"))
    for call in calls:
        with pytest.raises(ConfigError, match=r"^the stream: a frame broke off within the layers; expected reset"):
            call()
    assert list(tmp_path.iterdir()) == []
    session.reset()
    session.push(second, 1.0)
    fresh.push(second, 1.0)
    assert equal_states(session, fresh)
