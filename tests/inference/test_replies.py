"""Replies as growing text: what `generate` writes, row by row, with finish reasons and rates."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from model_cases import small_config
from PIL import Image

from hybridvl.data.chat import ChatFormat
from hybridvl.data.images import ImageConfig, ImageProcessor
from hybridvl.data.tokens import load_tokenizer
from hybridvl.inference import Sampling, replies
from hybridvl.inference.processor import Processor
from hybridvl.inference.replies import ReplyPiece, stream_replies
from hybridvl.layers import ConfigError
from hybridvl.models.vlm import VisionLanguageModel

NEW = 10


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor(ChatFormat(load_tokenizer()), ImageProcessor(ImageConfig(min_pixels=784)))


@pytest.fixture(scope="module")
def model(processor: Processor) -> VisionLanguageModel:
    torch.manual_seed(0)
    chat = processor.chat
    config = dataclasses.replace(
        small_config("swa gdn"),
        vocab_size=512,
        image_token_id=chat.image_token_id,
        video_token_id=chat.video_token_id,
        vision_start_token_id=3,
    )
    return VisionLanguageModel(config).eval()


def conversation(text: str, image: bool = False) -> list[dict]:
    picture = Image.radial_gradient("L").resize((56, 84))
    parts = [{"type": "image", "image": picture}] * image + [{"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def texts(pieces: list[ReplyPiece], rows: int) -> list[str]:
    return ["".join(piece.text for piece in pieces if piece.row == row) for row in range(rows)]


def test_a_batch_writes_what_generate_gives(model: VisionLanguageModel, processor: Processor) -> None:
    asked = [conversation("How many 7s?"), conversation("Read.", image=True), conversation("yes or no, please?")]
    inputs = processor.batch(asked)
    pieces = list(stream_replies(model, processor, inputs, NEW, chunk=7))
    length = inputs["input_ids"].shape[1]
    sampling = Sampling(stop_ids=(processor.stop_id,))
    tokens = model.generate(**inputs, max_new_tokens=NEW, sampling=sampling)[:, length:]
    assert texts(pieces, 3) == [processor.text(row) for row in tokens]
    for row, messages in enumerate(asked):
        alone = list(stream_replies(model, processor, processor.prompt(messages), NEW))
        assert texts(alone, 1)[0] == texts(pieces, 3)[row]
    ends = {piece.row: piece.finish_reason for piece in pieces if piece.finish_reason}
    stopped = [processor.stop_id in row for row in tokens.tolist()]
    assert ends == {row: "stop" if stopped[row] else "length" for row in range(3)}


def test_stop_tokens_and_texts(model: VisionLanguageModel, processor: Processor) -> None:
    inputs = processor.prompt(conversation("How many 7s?"))
    tokens = model.generate(**inputs, max_new_tokens=NEW)[0, inputs["input_ids"].shape[1] :].tolist()
    whole = processor.text(tokens)
    pieces = list(stream_replies(model, processor, inputs, NEW, Sampling(stop_ids=(tokens[4],))))
    first = tokens.index(tokens[4])
    assert texts(pieces, 1)[0] == processor.text(tokens[:first])
    assert [piece.finish_reason for piece in pieces][-1] == "stop"
    assert pieces[-1].rates.new_tokens == first
    stop = whole[3:6]
    pieces = list(stream_replies(model, processor, inputs, NEW, stops=[stop]))
    assert texts(pieces, 1)[0] == whole[: whole.find(stop)]
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["stop"]


def test_rates(model: VisionLanguageModel, processor: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves by one second whenever it is read: two readings a step."""
    clock = itertools.count()
    monkeypatch.setattr(replies.time, "perf_counter", lambda: float(next(clock)))
    inputs = processor.batch([conversation("How many 7s?"), conversation("no")])
    last = [*stream_replies(model, processor, inputs, 4, Sampling(stop_ids=(511,)))][-1].rates
    prompt = int(inputs["attention_mask"].sum())
    assert (last.prompt_tokens, last.new_tokens) == (prompt, 6)
    assert (last.prefill_rate, last.decode_rate) == (prompt, 2.0)
    state = model.init_state(2)
    assert last.state_bytes == state.nbytes


def test_nothing_to_write(model: VisionLanguageModel, processor: Processor) -> None:
    inputs = processor.prompt(conversation("no"))
    (piece,) = stream_replies(model, processor, inputs, 0)
    assert (piece.text, piece.finish_reason) == ("", "length")
    assert (piece.rates.prefill_rate, piece.rates.decode_rate) == (0.0, 0.0)
    with pytest.raises(ConfigError, match="max_new_tokens: -1"):
        list(stream_replies(model, processor, inputs, -1))
