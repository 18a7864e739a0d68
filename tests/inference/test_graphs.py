"""Recorded steps: what is replayed is what each call by itself computes, also when a window is full and begins anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from model_cases import relative_error, small_model
from streaming_cases import equal_states, frames_of, stream_model, stream_processor
from torch import Tensor
from traced_steps import Pair, TraceRecorder

from hybridvl.inference.graphs import MOST_GRAPHS, Bound, Inputs, Replay, Step, StepGraphs
from hybridvl.inference.streaming import StreamingSession
from hybridvl.models.decoder import ModelState
from hybridvl.models.generation import StepRunner
from hybridvl.models.vlm import VisionLanguageModel

PATTERNS = ["swa gdn", "mamba2*2", "(swa+gdn)*2"]
WINDOW = 8  # of the small models
STEPS = 24
TOLERANCE = 1e-5
PROCESSOR = stream_processor()


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def begun(pattern: str, rows: int, uneven: bool, reads: bool = False) -> tuple[Pair, TraceRecorder]:
    """Two tokens in every row, but one in the second where rows are uneven: the window is hardly filled."""
    recorder, model = TraceRecorder(reads), small_model(pattern)
    pair = Pair(model, StepGraphs(model, recorder=recorder), rows)
    pair.frame(2, torch.tensor([[True, True], [True, False]]) if uneven else None)
    return pair, recorder


@pytest.mark.parametrize(("rows", "uneven"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_recorded_steps_go_on_past_a_full_window(pattern: str, rows: int, uneven: bool) -> None:
    for step in (lambda pair: pair.frame(2), Pair.token):
        pair, recorder = begun(pattern, rows, uneven)
        assert max(step(pair) for _ in range(STEPS)) < TOLERANCE
        assert recorder.made == 1
        assert recorder.replayed >= STEPS - 1
        assert int(pair.state.length.min()) > 3 * WINDOW


@pytest.mark.parametrize("step", [lambda pair: pair.frame(2), Pair.token], ids=["frame", "token"])
@pytest.mark.parametrize("pattern", ["swa gdn", "(swa+gdn)*2"])
def test_a_length_read_while_recording_would_be_seen(pattern: str, step: Callable[[Pair], float]) -> None:
    pair, recorder = begun(pattern, 1, False, reads=True)
    assert max(step(pair) for _ in range(STEPS)) > 0.1
    assert recorder.made == 1


def test_recorded_steps_of_rows_with_padding() -> None:
    pair, recorder = begun("swa gdn mamba2 (swa+gdn)", 2, False)
    for number in range(STEPS):
        mask = torch.tensor([[True] * 3, [True, number % 2 == 0, number % 3 == 0]])
        assert pair.frame(3, mask) < TOLERANCE
    assert (recorder.made, recorder.replayed, pair.runner.reason) == (1, STEPS - 1, None)
    assert pair.state.length.tolist() == [2 + 3 * STEPS, 2 + STEPS + STEPS // 2 + STEPS // 3]


def test_states_are_told_apart_by_where_they_lie() -> None:
    pair, recorder = begun("swa gdn", 1, False)
    for _ in range(4):
        pair.frame(2)
    before, made = pair.state.clone(), recorder.made
    other = Pair(pair.plain.model, pair.runner)
    assert max(other.frame(2) for _ in range(6)) < TOLERANCE
    assert recorder.made == made + 1
    assert all(torch.equal(a, b) for a, b in zip(before.tensors().values(), pair.state.tensors().values(), strict=True))
    assert pair.frame(2) < TOLERANCE


def test_steps_recorded_in_inference_mode_go_on_outside_of_it() -> None:
    pair, recorder = begun("swa gdn", 1, False)
    with torch.inference_mode():
        inside = [pair.frame(2) for _ in range(4)]
    assert max(*inside, *(pair.frame(2) for _ in range(4))) < TOLERANCE
    assert (recorder.made, recorder.replayed, pair.runner.reason) == (1, 8, None)


def test_states_that_come_and_go_are_told_apart() -> None:
    """A new one may get the number that Python called a dead one by."""
    recorder, model = TraceRecorder(), small_model("swa gdn")
    runner, numbers = StepGraphs(model, recorder=recorder), set()
    for _ in range(12):
        pair = Pair(model, runner)
        numbers.add(id(pair.state))
        assert max(pair.frame(2) for _ in range(4)) < TOLERANCE
        del pair
    assert len(numbers) < 12
    assert (recorder.made, runner.reason) == (MOST_GRAPHS, None)


def test_few_graphs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recording takes long, so that more shapes in turn than there is room for do not push each other out."""
    pair, recorder = begun("gdn", 1, False)
    shapes = range(3, MOST_GRAPHS + 4)
    for tokens in [*shapes, *shapes, *shapes]:
        assert pair.frame(tokens) < TOLERANCE
    assert recorder.made == MOST_GRAPHS
    monkeypatch.setattr("hybridvl.inference.graphs.IDLE", 20)
    for _ in range(20):
        assert pair.frame(4) < TOLERANCE
    assert pair.frame(MOST_GRAPHS + 3) < TOLERANCE  # in place of that which has not come for longest
    assert recorder.made == MOST_GRAPHS + 1
    for tokens in (MOST_GRAPHS + 3, 4):
        assert pair.frame(tokens) < TOLERANCE
    assert recorder.made == MOST_GRAPHS + 1


def wide_model() -> VisionLanguageModel:
    """With a window that several frames of six tokens go into."""
    config = stream_model().config
    mixers = {**config.mixers, "swa": {**config.mixers["swa"], "window": 64}}
    torch.manual_seed(0)
    return VisionLanguageModel(dataclasses.replace(config, mixers=mixers)).eval()


@pytest.mark.parametrize(("together", "steps"), [(1, 4), (2, 5)])
def test_a_session_on_recorded_steps_is_the_same_stream(together: int, steps: int) -> None:
    model, recorder = wide_model(), TraceRecorder()
    runner = StepGraphs(model, recorder=recorder)
    session = StreamingSession(model, PROCESSOR, together=together, runner=runner)
    plain = StreamingSession(model, PROCESSOR, together=together)
    made = []
    for number, frame in enumerate(frames_of(0, 30)):
        session.push(frame, number)
        plain.push(frame, number)
        if number % 5 == 4:
            found, wanted = (list(stream.ask("What?", 6)) for stream in (session, plain))
            assert [piece.text for piece in found] == [piece.text for piece in wanted]
            made.append(recorder.made)
    for own, other in zip(session.state.tensors().values(), plain.state.tensors().values(), strict=True):
        assert relative_error(own, other) < TOLERANCE
    assert session.timeline.record() == plain.timeline.record()
    # Patches, frames, question and token, and what waits for the second of two frames when it is asked: each was
    # recorded once.
    assert made[2:] == [steps] * 4
    assert recorder.replayed > 60


def test_replies_take_turns_on_one_copy_of_the_state() -> None:
    model, recorder = wide_model(), TraceRecorder()
    runner = StepGraphs(model, recorder=recorder)
    session = StreamingSession(model, PROCESSOR, runner=runner)
    for frame in frames_of(0, 3):
        session.push(frame)
    first = runner.fork(session.state)
    lies = first.length.data_ptr()
    second = runner.fork(session.state)
    assert len({lies, second.length.data_ptr(), session.state.length.data_ptr()}) == 3
    first.length += 5
    del first
    third = runner.fork(session.state)
    assert third.length.data_ptr() == lies
    assert torch.equal(third.length, session.state.length)
    wanted = [piece.text for piece in session.ask("What?", 5)]
    replayed = recorder.replayed
    one, other = session.ask("What?", 5), session.ask("What?", 5)
    pairs = list(zip(one, other, strict=True))
    assert recorder.replayed > replayed
    assert runner.reason is None
    assert [(a.text, b.text) for a, b in pairs] == [(text, text) for text in wanted]


class Broken(TraceRecorder):
    """Cannot record, or what it has recorded cannot be replayed."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.when = when

    def record(self, step: Step, inputs: Inputs, bound: Bound) -> Replay:
        if self.when == "recording":
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

        def replay(inputs: Inputs) -> Tensor:
            raise RuntimeError("an illegal memory access")

        return replay


def test_what_cannot_be_recorded_runs_by_itself() -> None:
    model = stream_model()
    runner = StepGraphs(model, recorder=Broken("recording"))
    session, plain = StreamingSession(model, PROCESSOR, runner=runner), StreamingSession(model, PROCESSOR)
    assert runner.reason is None
    for frame in frames_of(0, 4):
        session.push(frame)
        plain.push(frame)
    assert runner.reason == "operation not permitted when stream is capturing"
    assert session.whole
    assert equal_states(session, plain)


def test_a_replay_that_breaks_off_leaves_the_state_torn() -> None:
    model = stream_model()
    session = StreamingSession(model, PROCESSOR, runner=StepGraphs(model, recorder=Broken("replaying")))
    first, second, third = frames_of(0, 3)
    session.push(first)
    features = model.encode_images(torch.zeros(24, model.config.vision.patch_dim), torch.tensor([[1, 4, 6]]))
    (step,) = session.steps.take(session.steps.ready(second), 1.0)
    session.push_features(features, step)  # the first of its shape
    (step,) = session.steps.take(session.steps.ready(third), 2.0)
    with pytest.raises(RuntimeError, match="illegal"):
        session.push_features(features, step)
    assert not session.whole


def test_reasons_against_graphs() -> None:
    model = small_model("swa gdn")
    assert StepGraphs(model).reason == "the model is on the device 'cpu'"
    assert StepGraphs(model, graphs=False).reason == "switched off"
    grows = StepGraphs(small_model("swa (full+gdn)"), recorder=TraceRecorder())
    assert grows.reason == "the state of full attention grows, and so moves"
    recorder = TraceRecorder()
    pair = Pair(model, StepGraphs(model, recorder=recorder))
    with torch.enable_grad():
        pair.token()
        pair.token()
    assert recorder.made == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_recurrent_parts_stay_in_float32(dtype: torch.dtype) -> None:
    model = stream_model("swa gdn mamba2").to(dtype)
    session = StreamingSession(model, PROCESSOR)
    for frame in frames_of(0, 3):
        session.push(frame)
    list(session.ask("What?", 3))
    kinds: dict[str, set[torch.dtype]] = {}
    for name, tensor in session.state.tensors().items():
        kinds.setdefault(name.rpartition(".")[2], set()).add(tensor.dtype)
    assert kinds.pop("recurrent") == {torch.float32}
    assert kinds.pop("length") == kinds.pop("rope_delta") == {torch.int64}
    assert set.union(*kinds.values()) == {dtype}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose graphs are recorded here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_cuda_graphs_go_on_past_a_full_window(pattern: str, dtype: torch.dtype) -> None:
    model = small_model(pattern, dtype).cuda()
    runner, plain = StepGraphs(model), StepRunner(model)
    state, right = model.init_state(1), model.init_state(1)
    tolerance = TOLERANCE if dtype == torch.float32 else 2e-2
    generator = torch.Generator("cuda").manual_seed(0)
    for number in range(2 * STEPS):
        tokens = torch.randint(0, 80, (1,), generator=generator, device="cuda")
        embeds = torch.randn(1, 2, 32, generator=generator, device="cuda").to(dtype)
        places = (right.next_position[None, :, None] + torch.arange(2, device="cuda")).expand(3, -1, -1)
        if number % 2:
            found, wanted = runner.decode(tokens, state), plain.decode(tokens, right)
        else:
            found, wanted = (way.run(embeds, places, None, own) for way, own in ((runner, state), (plain, right)))
        assert relative_error(found, wanted) < tolerance
        assert same_states(state, right, tolerance)
    assert runner.reason is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose graphs are recorded here")
def test_a_session_on_cuda_graphs() -> None:
    model = wide_model().cuda()
    session = StreamingSession(model, PROCESSOR)
    plain = StreamingSession(model, PROCESSOR, runner=StepGraphs(model, graphs=False))
    for number, frame in enumerate(frames_of(0, 30)):
        session.push(frame, number)
        plain.push(frame, number)
    assert [p.text for p in session.ask("What?", 6)] == [p.text for p in plain.ask("What?", 6)]
    assert same_states(session.state, plain.state, 1e-4)
    assert session.runner.reason is None


def same_states(left: ModelState, right: ModelState, tolerance: float) -> bool:
    pairs = zip(left.tensors().values(), right.tensors().values(), strict=True)
    return all(relative_error(own, other) < tolerance for own, other in pairs)
