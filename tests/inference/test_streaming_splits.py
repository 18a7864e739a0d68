"""However a stream is split into frames, texts and questions, it is the same conversation in one pass.

Hypothesis draws 40 streams of each layout; HYBRIDVL_EXAMPLES asks for more.
"""

from __future__ import annotations

import itertools
import math
import os

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_cases import relative_error
from streaming_cases import equal_states, first_logits, frames_of, one_pass, stream_model, stream_processor, text
from torch import Tensor

from hybridvl.inference.streaming import StreamingSession

MODEL, PROCESSOR = stream_model(), stream_processor()
SIZES = ((28, 28), (56, 28), (56, 84))
TOLERANCE = 2e-5
MANY = settings(
    max_examples=int(os.environ.get("HYBRIDVL_EXAMPLES", "40")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)

SAYINGS = st.tuples(st.just("say"), st.sampled_from(["A", " cat, 7", "\n", "<|im_end|>", "é"]))
QUESTIONS = st.tuples(st.just("ask"), st.sampled_from(["?", "Which one", ""]))
PICTURES = st.tuples(st.just("frame"), st.tuples(st.integers(0, 50), st.sampled_from(SIZES)))
PAUSES = st.tuples(st.just("frame"), st.sampled_from([0.0, 0.02, 0.4, 0.5, 1.0, 3.7]))


@MANY
@given(
    events=st.lists(st.one_of(PICTURES, SAYINGS, QUESTIONS), max_size=12),
    last=st.sampled_from(["How many?", "A"]),
)
def test_images_and_texts_one_by_one_are_one_conversation(events: list, last: str) -> None:
    session, quiet = (StreamingSession(MODEL, PROCESSOR, "images") for _ in range(2))
    parts = []
    for number, (kind, what) in enumerate(events):
        if kind == "frame":
            (frame,) = frames_of(what[0], 1, what[1])
            session.push(frame, number)
            quiet.push(frame, number)
            parts.append({"type": "image", "image": frame})
        elif kind == "say":
            session.say(what)
            quiet.say(what)
            parts.append(text(what))
        else:
            found, wanted = first_logits(session, what), one_pass(MODEL, PROCESSOR, [*parts, text(what)])
            assert relative_error(found, wanted) < TOLERANCE
            assert list(session.ask(what, max_new_tokens=2))
    assert equal_states(session, quiet)
    wanted = one_pass(MODEL, PROCESSOR, [*parts, text(last)])
    assert relative_error(first_logits(session, last), wanted) < TOLERANCE


@MANY
@given(
    events=st.lists(st.one_of(PAUSES, SAYINGS, QUESTIONS), max_size=12),
    size=st.sampled_from(SIZES),
    last=st.sampled_from(["How many?", "A"]),
)
def test_videos_and_texts_one_by_one_are_one_conversation(events: list, size: tuple[int, int], last: str) -> None:
    """Frames between two texts, at any times, are one video."""
    session, quiet = (StreamingSession(MODEL, PROCESSOR, "video") for _ in range(2))
    shown: list[tuple[str, object]] = []
    now = 0.0
    for number, (kind, what) in enumerate(events):
        if kind == "frame":
            now += what
            (frame,) = frames_of(number, 1, size)
            session.push(frame, now)
            quiet.push(frame, now)
            shown.append(("frame", (frame, now)))
        elif kind == "say":
            session.say(what)
            quiet.say(what)
            shown.append((kind, what))
        else:
            assert relative_error(first_logits(session, what), with_videos(shown, what)) < TOLERANCE
            assert list(session.ask(what, max_new_tokens=2))
    assert equal_states(session, quiet)
    assert relative_error(first_logits(session, last), with_videos(shown, last)) < TOLERANCE


@torch.no_grad()
def with_videos(shown: list, question: str) -> Tensor:
    """Logits (vocab,) for the first word of the reply, of the whole conversation in one pass."""
    parts, times = [], []
    for kind, group in itertools.groupby([*shown, ("say", question)], key=lambda event: event[0]):
        whats = [what for _, what in group]
        if kind == "say":
            parts += [text(what) for what in whats]
            continue
        frames, moments = zip(*whats, strict=True)
        # A step of the tower is two frames, so that each is there twice.
        parts.append({"type": "video", "video": [frame for frame in frames for _ in range(2)], "fps": 2.0})
        times.append(moments)
    inputs = PROCESSOR.prompt([{"role": "user", "content": parts}])
    positions = counted(inputs["input_ids"][0], inputs.get("video_grid_thw"), times)
    return MODEL(**inputs, position_ids=positions[:, None]).logits[0, -1]


def counted(ids: Tensor, grids: Tensor | None, times: list) -> Tensor:
    """Positions (3, T) as docs/stream.md tells them, token by token."""
    found: list[np.ndarray] = []
    video = PROCESSOR.chat.video_token_id
    place, following = 0, 0
    while place < len(ids):
        if int(ids[place]) != video:
            found.append(np.full((3, 1), following))
            place, following = place + 1, following + 1
            continue
        assert grids is not None
        moments = times.pop(0)
        steps, rows, columns = (grids[-1 - len(times)] // torch.tensor([1, 2, 2])).tolist()
        assert steps == len(moments)
        step = -1
        for moment in moments:
            step = max(step + 1, math.floor((moment - moments[0]) * MODEL.config.tokens_per_second + 1e-9))
            found += [
                np.array([[step], [row], [column]]) + following for row in range(rows) for column in range(columns)
            ]
        place += steps * rows * columns
        following += max(step, rows - 1, columns - 1) + 1
    return torch.from_numpy(np.concatenate(found, axis=1))
