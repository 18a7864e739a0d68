"""Work of streams: a frame, from its patches through vision tower and layers into a state of any number of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from hybridvl.bench.filling import filled_state, rewinder
from hybridvl.bench.model_cases import ModelRequest, inference_models, peer_side, weight_bytes
from hybridvl.bench.qwen2_5_vl import Qwen25TextPeer, Qwen25VisionPeer
from hybridvl.bench.sides import TOLERANCES, Results, Side, Work
from hybridvl.data.chat import ChatFormat
from hybridvl.data.tokens import load_tokenizer
from hybridvl.inference.graphs import StepGraphs
from hybridvl.inference.streaming.feeding import assembled, encode_steps, run_feeds
from hybridvl.inference.streaming.steps import FrameStep
from hybridvl.inference.streaming.timeline import Feed, Timeline
from hybridvl.layers.errors import ConfigError
from hybridvl.models.config import ModelConfig, VisionConfig
from hybridvl.models.decoder import ModelState
from hybridvl.models.vlm import VisionLanguageModel

_Encode = Callable[[], Tensor]
"""The frame's features (tokens, D)."""
_Read = Callable[[Feed, Tensor | None], Tensor]
"""Takes a feed and its features into the state; hidden states (1, T, D) of its last tokens."""


def with_vision(config: ModelConfig, vision: VisionConfig) -> ModelConfig:
    """A text model's configuration with a vision tower, and the visual tokens of the built-in tokenizer.

    Raises:
        ConfigError: the vocabulary has no room for them.
    """
    chat = _chat()
    if config.vocab_size < len(chat.tokenizer):
        raise ConfigError(f"--vocab {config.vocab_size}: expected at least {len(chat.tokenizer)}, the tokens of a chat")
    start, _ = chat.visual_ids()
    return dataclasses.replace(
        config,
        vision=vision,
        image_token_id=chat.image_token_id,
        video_token_id=chat.video_token_id,
        vision_start_token_id=start,
    )


def stream_works(request: ModelRequest, contexts: Sequence[int], side: int) -> Iterator[Work]:
    """For every context, one more frame of side x side visual tokens after it.

    Models of other patterns share the vision tower of ours. States are filled with noise (`filled_state`). Of
    transformers' Qwen2.5-VL the features of the frame, the hidden state after it, and the logits after a question that
    follows must equal those of our full attention.

    Raises:
        ConfigError: side is not a number of tokens, or the patterns do not fit the peers.
    """
    if side < 1:
        raise ConfigError(f"--side {side}: expected at least 1 visual token")
    models, peer = inference_models(request)
    first = next(iter(models.values()))
    for model in models.values():
        model.visual = first.visual
    assert first.visual is not None
    tower = None if peer is None else Qwen25VisionPeer(first.visual)
    for context in contexts:
        frame = _frame(request.config, context, side)
        sides = []
        for pattern, model in models.items():
            state = filled_state(model, context)
            run, check = _runs(model, frame, *_ours(model, frame, state))
            ours = Side(
                pattern,
                run,
                check,
                before=rewinder(state, tokens=side**2),
                weight_bytes=weight_bytes(model),
                state_bytes=state.nbytes,
            )
            sides.append(ours)
            if peer is not None and tower is not None and model is peer[1]:
                cache = peer[0].cache(state, context)
                run, check = _runs(model, frame, *_theirs(model, frame, peer[0], tower, cache))
                sides.append(peer_side(ours, run, peer[0].rewinder(cache), peer[0].cache_bytes(context), check))
            del state
        yield Work(
            name=f"stream {request.pattern}",
            sizes={"D": request.config.width, "side": side, "T": context},
            dtype=request.dtype_name,
            direction="stream",
            device=request.device,
            sides=tuple(sides),
            tokens=side**2,
            frames=1,
            tolerance=TOLERANCES[request.dtype_name],
        )


@dataclass(frozen=True)
class _Frame:
    """step: patches of noise. timeline: of the stream before it. side: visual tokens per side."""

    step: FrameStep
    timeline: Timeline
    side: int

    def feed(self, timeline: Timeline) -> Feed:
        """Where its tokens stand; the timeline goes on."""
        return timeline.frame(self.side, self.side, self.step.time)


def _frame(config: ModelConfig, context: int, side: int) -> _Frame:
    """A frame as it comes in a video that has been growing, a frame for every temporal position."""
    assert config.vision is not None
    timeline = Timeline.opened(_chat(), "video", config.tokens_per_second)
    timeline.frame(side, side, 0.0)  # takes the opening of the conversation, so that every frame is its tokens alone
    time = (1 + context // side**2) / config.tokens_per_second
    patches = side * config.vision.spatial_merge_size
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(patches**2, config.vision.patch_dim, generator=generator)
    return _Frame(FrameStep(rows, (1, patches, patches), time), timeline, side)


def _ours(model: VisionLanguageModel, frame: _Frame, state: ModelState) -> tuple[_Encode, _Read]:
    runner = StepGraphs(model)

    def read(feed: Feed, features: Tensor | None) -> Tensor:
        return run_feeds(runner, state, [feed], [features])

    return lambda: encode_steps(runner, [frame.step])[0], read


def _theirs(
    model: VisionLanguageModel, frame: _Frame, text: Qwen25TextPeer, tower: Qwen25VisionPeer, cache: object
) -> tuple[_Encode, _Read]:
    device = model.lm_head_weight.device
    grid = torch.tensor([frame.step.grid], device=device)

    def read(feed: Feed, features: Tensor | None) -> Tensor:
        embeds, positions, _ = assembled(model, [feed], [features])
        return text.hidden(embeds, positions, cache)

    return lambda: tower.features(frame.step.rows.to(device), grid), read


def _runs(
    model: VisionLanguageModel, frame: _Frame, encode: _Encode, read: _Read
) -> tuple[Callable[[], Results], Callable[[], Results]]:
    """The timed work, a frame, and what is compared: its results, and the logits after a question about it."""

    def show(timeline: Timeline) -> Results:
        features = encode()
        return {"features": features, "hidden": read(frame.feed(timeline), features)[:, -1]}

    @torch.no_grad()
    def run() -> Results:
        return show(frame.timeline.copy())

    @torch.no_grad()
    def check() -> Results:
        timeline = frame.timeline.copy()
        found = show(timeline)
        hidden = read(timeline.question("What is there?"), None)
        return {**found, "logits": model.logits(hidden[:, -1])}

    return run, check


@cache
def _chat() -> ChatFormat:
    return ChatFormat(load_tokenizer())
