"""Prefill in chunks, then decode token by token with a state of constant address: generation as a generator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridvl.layers import ConfigError

if TYPE_CHECKING:
    from hybridvl.models.decoder import ModelState
    from hybridvl.models.vlm import VisionLanguageModel

PREFILL_CHUNK = 2048


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most likely token; otherwise logits are divided by it and a token is drawn.
        top_p: draw among the most likely tokens that together reach this probability; 1 draws among all.
        seed: seed of the draws; None draws from torch's global generator.
        stop_ids: tokens that end a row.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ConfigError(f"temperature: {self.temperature}; expected 0 (greedy) or a number above 0")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: {self.top_p}; expected a number above 0, at most 1")


@dataclass(frozen=True)
class GenerationStep:
    """One decoded position of all rows.

    tokens: (B,) int64. logits: (B, vocab) they were chosen from. finished: (B,) bool, rows that hold a stop token.
    state: the model's state before it has seen `tokens`; clone it to go on elsewhere.
    """

    tokens: Tensor
    logits: Tensor
    finished: Tensor
    state: ModelState


@torch.no_grad()
def generate(
    model: VisionLanguageModel,
    embeds: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 16,
    sampling: Sampling | None = None,
    state: ModelState | None = None,
) -> Iterator[GenerationStep]:
    """Decode after a prompt of embeddings (B, T, D) at positions (3, B, T), both as `VisionLanguageModel` makes them.

    attention_mask: (B, T), nonzero at real tokens; every row needs one. state: what came before the prompt; a fresh
    one by default. Ends after max_new_tokens steps, or when every row has met a stop token; finished rows repeat it.
    """
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens: {max_new_tokens}; expected at least 0")
    sampling = sampling or Sampling()
    state = model.init_state(embeds.shape[0], embeds.device, embeds.dtype) if state is None else state
    if max_new_tokens == 0:
        return
    generator = None
    if sampling.seed is not None:
        generator = torch.Generator(embeds.device).manual_seed(sampling.seed)
    hidden = prefill(model, embeds, position_ids, attention_mask, state)
    stop_ids = torch.tensor(sampling.stop_ids, dtype=torch.int64, device=embeds.device)
    tokens, finished = None, None
    for step in range(max_new_tokens):
        logits = F.linear(hidden, model.lm_head_weight)  # (B, vocab)
        chosen = _choose(logits, sampling, generator)
        tokens = chosen if tokens is None or finished is None else torch.where(finished, tokens, chosen)
        finished = torch.isin(tokens, stop_ids)
        yield GenerationStep(tokens, logits, finished, state)
        if step == max_new_tokens - 1 or (sampling.stop_ids and bool(finished.all())):
            return
        hidden = decode_step(model, tokens, state)


@torch.no_grad()
def prefill(
    model: VisionLanguageModel,
    embeds: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor | None,
    state: ModelState,
    chunk: int = PREFILL_CHUNK,
) -> Tensor:
    """Feed a prompt into the state, `chunk` tokens at a time; the hidden state (B, D) of each row's last real token."""
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
    for begin in range(0, length, chunk):
        piece = slice(begin, begin + chunk)
        mask = None if attention_mask is None else attention_mask[:, piece]
        hidden = model.run_decoder(embeds[:, piece], position_ids[:, :, piece], mask, state=state)
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


def _choose(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.float() / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # the first token past top_p is still kept
        kept = ordered.masked_fill(before >= sampling.top_p, 0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, kept)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
