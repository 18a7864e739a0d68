"""Prefill in chunks, then decode token by token with a state of constant address: generation as a generator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hybridvl.layers import ConfigError
from hybridvl.layers.validate import fits
from hybridvl.models.sampling import Sampler, Sampling, seen_tokens

if TYPE_CHECKING:
    from hybridvl.models.decoder import ModelState
    from hybridvl.models.vlm import VisionLanguageModel

__all__ = [
    "PREFILL_CHUNK",
    "GenerationStep",
    "Sampling",
    "StepRunner",
    "check_request",
    "decode_step",
    "generate",
    "prefill",
]

PREFILL_CHUNK = 2048
"""Prompt tokens that go through the layers at a time, unless a call says otherwise."""


@dataclass(frozen=True)
class GenerationStep:
    """One decoded position of all rows.

    tokens: (B,) int64. logits: (B, vocab) as the model gave them. scores: (B, vocab), the logits after penalty,
    temperature, top-k and top-p, from which `tokens` were chosen. finished: (B,) bool, rows that hold a stop token.
    state: the model's state before it has seen `tokens`; clone it to go on elsewhere.
    """

    tokens: Tensor
    logits: Tensor
    scores: Tensor
    finished: Tensor
    state: ModelState


class StepRunner:
    """Runs the steps of a model, each call by itself; `hybridvl.inference.graphs.StepGraphs` has faster ways.

    Args:
        model: whose steps they are.
    """

    def __init__(self, model: VisionLanguageModel) -> None:
        self.model = model

    def encode(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """Features (tokens, D) of patches (P, patch_dim) that lie where the model does; grid_thw: (n, 3) int64."""
        return self.model.encode_images(pixel_values, grid_thw)

    def run(self, embeds: Tensor, position_ids: Tensor, attention_mask: Tensor | None, state: ModelState) -> Tensor:
        """Hidden states (B, T, D) of embeddings (B, T, D) at positions (3, B, T), taken into the state in place."""
        return self.model.run_decoder(embeds, position_ids, attention_mask, state=state)

    def decode(self, tokens: Tensor, state: ModelState) -> Tensor:
        """Logits (B, vocab) after one more token (B,) of every row, taken into the state in place."""
        return self.model.logits(decode_step(self.model, tokens, state))

    def fork(self, state: ModelState) -> ModelState:
        """A copy of a state, for a reply."""
        return state.clone()


@torch.no_grad()
def generate(
    model: VisionLanguageModel,
    embeds: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 16,
    sampling: Sampling | None = None,
    state: ModelState | None = None,
    chunk: int = PREFILL_CHUNK,
    input_ids: Tensor | None = None,
    runner: StepRunner | None = None,
) -> Iterator[GenerationStep]:
    """Decode after a prompt of embeddings (B, T, D) at positions (3, B, T), both as `VisionLanguageModel` makes them.

    attention_mask: (B, T), nonzero at real tokens; every row needs one. state: what came before the prompt; a fresh
    one by default. chunk: prompt tokens per call of the layers; any number gives the same result. input_ids: (B, T)
    tokens of the prompt, needed with a repetition penalty. runner: runs the model's steps; by default, each call by
    itself. Ends after max_new_tokens steps, or when every row has met a stop token; finished rows repeat it.
    `VisionLanguageModel.steps` is the same from tokens and pictures.
    """
    sampling = sampling or Sampling()
    check_request(max_new_tokens, chunk)
    seen = None
    if sampling.repetition_penalty != 1:
        if input_ids is None:
            raise ConfigError("input_ids: None; expected the prompt's tokens, which repetition_penalty counts")
        seen = seen_tokens(input_ids, attention_mask, model.config.vocab_size)
    state = model.init_state(embeds.shape[0], embeds.device, embeds.dtype) if state is None else state
    if max_new_tokens == 0:
        return
    sampler = Sampler(sampling, seen, embeds.device)
    runner = runner or StepRunner(model)
    logits = model.logits(prefill(model, embeds, position_ids, attention_mask, state, chunk, runner))  # (B, vocab)
    stop_ids = torch.tensor(sampling.stop_ids, dtype=torch.int64, device=embeds.device)
    tokens, finished = None, None
    for step in range(max_new_tokens):
        if not bool(logits.isfinite().all()):
            raise ConfigError(
                f"logits: not finite in {logits.dtype}; expected weights without NaN, in a dtype with room for what "
                "they compute (bfloat16 or float32)"
            )
        scores = sampler.scores(logits)
        chosen = sampler.choose(scores)
        tokens = chosen if tokens is None or finished is None else torch.where(finished, tokens, chosen)
        sampler.remember(tokens)
        finished = torch.isin(tokens, stop_ids)
        yield GenerationStep(tokens, logits, scores, finished, state)
        if step == max_new_tokens - 1 or (sampling.stop_ids and bool(finished.all())):
            return
        logits = runner.decode(tokens, state)


@torch.no_grad()
def prefill(
    model: VisionLanguageModel,
    embeds: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor | None,
    state: ModelState,
    chunk: int = PREFILL_CHUNK,
    runner: StepRunner | None = None,
) -> Tensor:
    """Feed a prompt into the state, `chunk` tokens at a time; the hidden state (B, D) of each row's last real token."""
    check_request(0, chunk)
    runner = runner or StepRunner(model)
    rows, length = embeds.shape[:2]
    last = torch.full((rows,), length - 1, device=embeds.device)
    if attention_mask is not None:
        real = attention_mask != 0
        if not bool(real.any(1).all()):
            raise ConfigError("attention_mask: a row without a real token; expected at least one in every row")
        last = length - 1 - real.flip(1).to(torch.uint8).argmax(1)
    elif length == 0:
        raise ConfigError("input_ids: an empty prompt; expected at least one token")
    result = embeds.new_zeros(rows, embeds.shape[2])
    chunk = min(chunk, length)
    for begin in range(0, length, chunk):
        piece = slice(begin, begin + chunk)
        mask = None if attention_mask is None else attention_mask[:, piece]
        hidden = runner.run(embeds[:, piece], position_ids[:, :, piece], mask, state)
        here = (last >= begin) & (last < begin + chunk)
        index = (last - begin).clamp(0, hidden.shape[1] - 1)
        picked = hidden[torch.arange(rows, device=hidden.device), index]
        result = torch.where(here[:, None], picked, result)
    return result


@torch.no_grad()
def decode_step(model: VisionLanguageModel, tokens: Tensor, state: ModelState) -> Tensor:
    """Feed one token per row (B,) into the state; its hidden state (B, D)."""
    positions = state.next_position[None, :, None].expand(3, -1, 1)
    # Not `embed`: a generated visual token is a token like any other, no image belongs to it.
    embeds = model.decoder.embed_tokens(tokens.unsqueeze(1))
    return model.run_decoder(embeds, positions, state=state).squeeze(1)


def check_request(max_new_tokens: int, chunk: int) -> None:
    """Raise ConfigError unless so many tokens can be asked for, and a prompt cut like this."""
    for name, value, least in (("max_new_tokens", max_new_tokens, 0), ("chunk", chunk, 1)):
        if not fits(value, int) or value < least:
            raise ConfigError(f"{name}: {value!r}; expected a whole number of at least {least}")
