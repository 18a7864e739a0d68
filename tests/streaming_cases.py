"""What the tests of streams share: a small model with its processor, frames, sessions, and one whole pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from model_cases import small_config
from torch import Tensor

import hybridvl
from hybridvl.data.chat import ChatFormat
from hybridvl.data.images import CLIP_MEAN, CLIP_STD, ImageConfig, ImageProcessor
from hybridvl.data.tokens import load_tokenizer
from hybridvl.data.video import VideoConfig, VideoProcessor
from hybridvl.inference.processor import Processor
from hybridvl.inference.streaming import StreamingSession
from hybridvl.models.vlm import VisionLanguageModel

LIMITS = (784.0, 4704.0)


def stream_processor(mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD) -> Processor:
    """Small frames: at most six visual tokens each."""
    images = ImageProcessor(ImageConfig(min_pixels=784, max_pixels=4704, mean=mean, std=std))
    videos = VideoConfig(fps=1.0, min_pixels=784, max_pixels=4704)
    return Processor(ChatFormat(load_tokenizer()), images, VideoProcessor(images, videos))


def stream_model(pattern: str = "swa gdn", convention: str = "v457") -> VisionLanguageModel:
    """A model of width 32 with a window of 8 tokens, its weights the same for every call."""
    torch.manual_seed(0)
    chat = stream_processor().chat
    config = dataclasses.replace(
        small_config(pattern),
        vocab_size=512,
        image_token_id=chat.image_token_id,
        video_token_id=chat.video_token_id,
        vision_start_token_id=3,
        video_convention=convention,
    )
    return VisionLanguageModel(config).eval()


def saved_model(place: Path, pattern: str = "swa gdn") -> Path:
    """The folder of the model and its processor."""
    hybridvl.save(stream_model(pattern), place)
    stream_processor().save(place)
    return place


def frames_of(seed: int, count: int, size: tuple[int, int] = (56, 84)) -> list[np.ndarray]:
    """Frames (H, W, 3) uint8 of noise."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for _ in range(count)]


def session_of(folder: Path, frames: Iterable[tuple[np.ndarray, float]], layout: str = "video") -> StreamingSession:
    """A session of a saved model that was shown frames at their times."""
    session = StreamingSession(hybridvl.load(folder).eval(), Processor.load(folder), layout)
    for pixels, time in frames:
        session.push(pixels, time)
    return session


def kept(path: Path, like: StreamingSession) -> StreamingSession:
    """The stream that was saved, of the model of another session."""
    return StreamingSession.load(path, like.model, like.processor)


def reply(session: StreamingSession, question: str, most: int) -> str:
    """The whole of it, of at most so many tokens."""
    return "".join(piece.text for piece in session.ask(question, most))


def text(words: str) -> dict[str, str]:
    """A part of a turn."""
    return {"type": "text", "text": words}


def out_of_memory(*_: object) -> NoReturn:
    """In place of what asks for memory."""
    raise MemoryError


@torch.no_grad()
def one_pass(model: VisionLanguageModel, processor: Processor, parts: list[dict]) -> Tensor:
    """Logits (vocab,) for the first word of the reply to a user's turn of these parts."""
    inputs = processor.prompt([{"role": "user", "content": parts}])
    return model(**inputs).logits[0, -1]


def first_logits(session: StreamingSession, question: str) -> Tensor:
    """The same for a question to a stream."""
    fork = session.fork()
    for step in fork.steps.rest():
        fork.push_step(step)
    feed = fork.timeline.question(question)
    with torch.no_grad():
        ids = torch.tensor([feed.before])
        hidden = fork.model.run_decoder(fork.model.embed(ids), feed.positions[:, None], state=fork.state)
        return fork.model.logits(hidden)[0, -1]


def equal_states(left: StreamingSession, right: StreamingSession) -> bool:
    """Whether the states of two streams and all that belongs to them are the same to the last bit."""
    pairs = zip(left.state.tensors().items(), right.state.tensors().items(), strict=True)
    same = all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    return same and left.timeline.record() == right.timeline.record()
