"""Pools of streams: each is what it would be alone, whatever the others do and whoever had its row before."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import relative_error
from streaming_cases import equal_states, frames_of, out_of_memory, reply, stream_model, stream_processor

from hybridvl.inference.streaming import StreamingSession, StreamPool
from hybridvl.layers import ConfigError

PROCESSOR = stream_processor()
MODELS = {pattern: stream_model(pattern) for pattern in ("swa gdn", "mamba2 full", "swa+gdn full")}
SIZES = ((28, 28), (56, 28), (56, 84))
TOLERANCE = 2e-5

pushes = st.dictionaries(st.integers(0, 2), st.tuples(st.integers(0, 30), st.sampled_from(SIZES)), min_size=1)
events = st.lists(
    st.one_of(
        st.tuples(st.just("push"), pushes),
        st.tuples(st.just("say"), st.integers(0, 2)),
        st.tuples(st.just("ask"), st.just(None)),
        st.tuples(st.just("close"), st.integers(0, 2)),
    ),
    min_size=1,
    max_size=8,
)


def agree(pool: StreamPool, alone: dict[int, StreamingSession]) -> None:
    for stream, session in alone.items():
        found = pool.session(stream)
        assert found.timeline.record() == session.timeline.record()
        pairs = zip(found.state.tensors().items(), session.state.tensors().items(), strict=True)
        for (name, own), (_, wanted) in pairs:
            shared = min(own.shape[1:2], wanted.shape[1:2])  # a cache that grows may be longer beside longer ones
            own, wanted = (own[:, : shared[0]], wanted[:, : shared[0]]) if name[-2:] in (".k", ".v") else (own, wanted)
            assert relative_error(own, wanted) < TOLERANCE, name


@settings(max_examples=25, deadline=None)
@given(events=events, pattern=st.sampled_from(list(MODELS)), together=st.sampled_from([1, 2]))
def test_streams_of_a_pool_are_what_they_are_alone(events: list, pattern: str, together: int) -> None:
    model = MODELS[pattern]
    pool = StreamPool(model, PROCESSOR, 3, together=together)
    alone = {pool.open(): StreamingSession(model, PROCESSOR, together=together) for _ in range(3)}
    for kind, what in events:
        if kind == "push":
            frames = {stream: frames_of(seed, 1, size)[0] for stream, (seed, size) in what.items()}
            pool.push({stream: (frame, None) for stream, frame in frames.items()})
            for stream, frame in frames.items():
                alone[stream].push(frame)
        elif kind == "say":
            pool.say(what, "A b")
            alone[what].say("A b")
        elif kind == "ask":
            texts = dict.fromkeys(alone, "")
            for stream, piece in pool.ask({0: "What?", 2: "A long question, 12?", 1: ""}, 4):
                texts[stream] += piece.text
            for stream, question in ((0, "What?"), (1, ""), (2, "A long question, 12?")):
                assert texts[stream] == reply(alone[stream], question, 4)
        else:
            pool.close(what)
            assert pool.open() == what
            alone[what] = StreamingSession(model, PROCESSOR, together=together)
    agree(pool, alone)


def test_questions_leave_no_trace_and_memory_stays() -> None:
    pool = StreamPool(MODELS["swa gdn"], PROCESSOR, 3)
    streams = [pool.open() for _ in range(3)]
    buffers = [tensor.data_ptr() for tensor in pool.state.tensors().values()]
    for number, frame in enumerate(frames_of(0, 5)):
        pool.push({stream: (frame, float(number)) for stream in streams[: 1 + number % 3]})
    before = [pool.session(stream) for stream in streams]
    assert list(pool.ask({0: "What?", 1: "Why?"}, 5))
    assert list(pool.ask({})) == []
    assert all(equal_states(pool.session(stream), before[stream]) for stream in streams)
    assert [tensor.data_ptr() for tensor in pool.state.tensors().values()] == buffers


def test_streams_come_from_sessions_and_leave_as_sessions() -> None:
    model = MODELS["mamba2 full"]
    session = StreamingSession(model, PROCESSOR)
    for frame in frames_of(3, 12):
        session.push(frame)
    pool = StreamPool(model, PROCESSOR, 2)
    first = pool.open()
    second = pool.open(session)
    (frame,) = frames_of(4, 1)
    pool.push({first: (frame, 0.0)})
    taken = pool.session(second)
    assert taken.timeline.record() == session.timeline.record()
    pool.push({second: (frame, None)})
    session.push(frame)
    taken.push(frame)
    agree(pool, {second: session})
    agree(pool, {second: taken})


def test_what_a_pool_refuses() -> None:
    model = MODELS["swa gdn"]
    with pytest.raises(ConfigError, match=r"^capacity: 0; expected a whole number of streams of at least 1$"):
        StreamPool(model, PROCESSOR, 0)
    pool = StreamPool(model, PROCESSOR, 2)
    with pytest.raises(ConfigError, match=r"^stream: 0; expected an open one: none$"):
        pool.push({0: (frames_of(0, 1)[0], 0.0)})
    pool.open()
    with pytest.raises(ConfigError, match=r"^session: of another model; expected one of the pool's$"):
        pool.open(StreamingSession(MODELS["mamba2 full"], PROCESSOR))
    pool.open()
    with pytest.raises(ConfigError, match=r"^capacity: all 2 streams are taken; expected one to be closed first$"):
        pool.open()
    with pytest.raises(ConfigError, match=r"^stream: 7; expected an open one: 0, 1$"):
        pool.ask({7: "What?"})
    with pytest.raises(ConfigError, match=r"^max_new_tokens: -1; expected"):
        pool.ask({0: "What?"}, -1)


def test_what_breaks_off_within_the_layers_has_shown_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["swa gdn"]
    pool = StreamPool(model, PROCESSOR, 2)
    streams = [pool.open() for _ in range(2)]
    (frame,) = frames_of(0, 1)
    before = [pool.session(stream) for stream in streams]
    with monkeypatch.context() as patch:
        patch.setattr(model.decoder.layers[1], "forward", out_of_memory)
        with pytest.raises(MemoryError):
            pool.push(dict.fromkeys(streams, (frame, 0.0)))
    assert all(equal_states(pool.session(stream), before[stream]) for stream in streams)


@pytest.mark.parametrize("wrong", ["time", "frame"])
def test_a_mistake_in_one_stream_shows_nothing_to_any(wrong: str) -> None:
    pool = StreamPool(MODELS["swa gdn"], PROCESSOR, 2, together=2)
    streams = [pool.open() for _ in range(2)]
    first, second, third = frames_of(0, 3)
    for frame, at in ((first, 1.0), (second, 2.0), (third, 3.0)):
        pool.push(dict.fromkeys(streams, (frame, at)))
    before = [pool.session(stream) for stream in streams]
    bad = (first, 0.5) if wrong == "time" else (b"no picture", 4.0)
    with pytest.raises(ConfigError, match="time: 0.5; expected" if wrong == "time" else "^stream 1: frame 1: "):
        pool.push({0: (first, 4.0), 1: bad})
    for stream in streams:
        found, wanted = pool.session(stream), before[stream]
        assert equal_states(found, wanted)
        assert all(
            np.array_equal(a, b) for a, b in zip(found.steps.waiting()[0], wanted.steps.waiting()[0], strict=True)
        )
        assert len(found.steps.waiting()[0]) == 1


def test_rows_of_a_state_keep_their_layout() -> None:
    state = MODELS["mamba2 full"].init_state(4)
    for number, tensor in enumerate(state.tensors().values()):
        tensor.copy_(torch.randn(tensor.shape) if tensor.is_floating_point() else torch.arange(4) + number)
    index = torch.tensor([3, 1])
    rows = state.take_rows(index)
    for (name, whole), (_, taken) in zip(state.tensors().items(), rows.tensors().items(), strict=True):
        assert torch.equal(taken, whole[index]), name
        assert taken.stride()[1:] == whole.stride()[1:], name
    other = MODELS["mamba2 full"].init_state(4)
    other.put_rows(index, rows)
    for (name, whole), (_, found) in zip(state.tensors().items(), other.tensors().items(), strict=True):
        assert torch.equal(found[index], whole[index]), name
        assert not found[[0, 2]].any(), name
