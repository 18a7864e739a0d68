"""A session gives what the published streaming code was recorded to give, frame by frame and through its answer."""

from __future__ import annotations

import pytest
import torch
from model_cases import DATA, Recorded, relative_error
from recorded_runs import INFINITE, STREAM, state_arrays
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import hybridvl
from hybridvl.data.chat import ChatFormat
from hybridvl.data.images import ImageConfig, ImageProcessor
from hybridvl.data.tokens import SPECIAL_TOKENS
from hybridvl.inference import Processor
from hybridvl.inference.streaming import FrameStep, StreamingSession
from hybridvl.inference.streaming.timeline import Timeline, Video

MODEL, RECORDED = hybridvl.load(DATA / INFINITE).eval(), Recorded(DATA / STREAM)
TOLERANCE = 1e-4  # the recording's own
NEW = 8


class BareChat(ChatFormat):
    """The recorded question is not closed and its answer not opened."""

    def turn_closing(self) -> list[int]:
        return []


def chat() -> ChatFormat:
    """Words are numbers of tokens; the tokens around visual ones are those of the recorded model."""
    config = MODEL.config
    named = {"<|vision_start|>": 248, "<|vision_end|>": 249, "<|image_pad|>": config.image_token_id}
    words = {f"{number}": number for number in range(256) if number not in named.values()}
    others = [name for name in SPECIAL_TOKENS if name not in named]
    vocab = {**words, **named, **{name: 256 + number for number, name in enumerate(others)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return BareChat(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def session_at(origin: int) -> StreamingSession:
    """A stream before its first frame whose video has begun at a position: by right 1, after the token before it."""
    processor = Processor(chat(), ImageProcessor(ImageConfig()))
    session = StreamingSession(MODEL, processor)
    session.timeline = Timeline(
        processor.chat, rate=MODEL.config.tokens_per_second, ids=[248], video=Video(origin, began=0.0)
    )
    return session


def shown(session: StreamingSession) -> Tensor:
    """Show the recorded frames, one a second; logits (1, T, vocab) of all tokens up to the last frame's."""
    hidden: list[Tensor] = []
    kept = MODEL.decoder.register_forward_hook(lambda module, given, found: hidden.append(found))
    grid = tuple(RECORDED.inputs["frame_grid_thw"][0].tolist())
    for second, rows in enumerate(RECORDED.inputs["frames.pixel_values"].float().chunk(5)):
        session.push_step(FrameStep(rows, grid, float(second)))
    kept.remove()
    with torch.no_grad():
        return MODEL.logits(torch.cat(hidden, dim=1))


def question() -> str:
    first, *others = RECORDED.inputs["question.input_ids"][0].tolist()
    assert first == 249  # the end of the video, which a session puts there itself
    return " ".join(map(str, others))


@pytest.mark.parametrize(("origin", "case"), [(1, "oneshot_standard_positions"), (2, "stream")])
def test_logits_of_every_frame_are_those_recorded(origin: int, case: str) -> None:
    """The published streaming code begins one position late ("stream"); its other code does not."""
    wanted = RECORDED.expected[f"{case}.logits"]
    found = shown(session_at(origin))
    assert found.shape[1] == 31
    assert relative_error(found, wanted[:, :31]) < TOLERANCE


def test_the_fault_of_the_published_positions_shows() -> None:
    found, wanted = shown(session_at(1)), RECORDED.expected["stream.logits"][:, :31]
    assert relative_error(found, wanted) > 0.1


def test_states_and_answer_are_those_recorded() -> None:
    session, expected = session_at(2), RECORDED.expected
    shown(session)
    for name, found in state_arrays("stream.after_frames", session.state.layers).items():
        assert relative_error(found, expected[name]) < TOLERANCE, name
    before = session.state.clone().tensors()
    reply = "".join(piece.text for piece in session.ask(question(), NEW))
    assert [int(word) for word in reply.split()] == expected["stream.answer_tokens"][0].tolist()
    assert all(torch.equal(before[name], tensor) for name, tensor in session.state.tensors().items())
