"""Divergences from a teacher of whom only the most likely tokens are known, all others together being one more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hybridvl.training.losses.divergences import (
    MEASURES,
    check_kind,
    chunk_sizes,
    log_probabilities,
    precise_dtype,
    slices,
    swept,
)

_NOTHING = -1e4  # log of a probability of 0 that can be subtracted from itself


class TopTokens(NamedTuple):
    """What is known of a teacher's next-token distributions at N tokens.

    tokens: (N, k) int32, the most likely tokens, the likeliest first.
    log_probs: (N, k) float32, their log probabilities.
    rest: (N,) float32, the log of the probability of all other tokens together; -inf where there are no others.
    """

    tokens: Tensor
    log_probs: Tensor
    rest: Tensor

    def split(self, counts: Sequence[int]) -> list[TopTokens]:
        """The parts of the first, second, ... so many tokens."""
        return [TopTokens(*parts) for parts in zip(*(value.split(list(counts)) for value in self), strict=True)]

    @staticmethod
    def joined(parts: Sequence[TopTokens], device: torch.device) -> TopTokens:
        """Several one after the other, on a device."""
        return TopTokens(*(torch.cat([v.to(device) for v in values]) for values in zip(*parts, strict=True)))


@torch.no_grad()
def top_tokens(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    temperature: float = 1.0,
    token_chunk: int | None = None,
    vocab_chunk: int | None = None,
) -> TopTokens:
    """The k most likely next tokens of softmax(hidden @ weight.T / temperature).

    hidden (N, D), weight (V, D) with V >= k; `token_chunk` tokens have logits at a time, see `linear_divergence`.
    """
    tokens_at_once, columns = chunk_sizes(hidden.device, token_chunk, vocab_chunk)
    tiles = slices(weight.shape[0], columns)
    parts = []
    for rows in slices(hidden.shape[0], tokens_at_once):
        log_p = hidden.new_empty((rows.stop - rows.start, weight.shape[0]), dtype=precise_dtype(hidden, weight))
        log_probabilities(hidden[rows], weight, temperature, tiles, log_p)
        values, tokens = log_p.topk(k, dim=-1)
        log_p.scatter_(-1, tokens, -math.inf)
        parts.append(TopTokens(tokens.int(), values.float(), _log_sum(log_p, tiles).float()))
    none = TopTokens(hidden.new_empty((0, k)).int(), hidden.new_empty((0, k)).float(), hidden.new_empty(0).float())
    return TopTokens.joined(parts or [none], hidden.device)


def top_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher: TopTokens,
    kind: str = "forward",
    temperature: float = 1.0,
    token_chunk: int | None = None,
    vocab_chunk: int | None = None,
) -> Tensor:
    """`linear_divergence` between distributions over k + 1 outcomes: the teacher's top tokens, and any other token.

    The student's probability of any other token is the sum of those of all tokens that are not among the teacher's k.
    The result is never larger than the divergence over the whole vocabulary, and equal to it where k is the size of the
    vocabulary or where the student shares out the rest as the teacher does.

    Args:
        hidden: (N, D) the student's hidden states after the final norm.
        weight: (V, D) its output head.
        teacher: (N, ...) what is known of the teacher, at the same temperature.
        kind, temperature, token_chunk, vocab_chunk: as of `linear_divergence`; logits of the student alone are made.

    Returns:
        () float32 (float64 for float64 input), the mean over the tokens times temperature ** 2; 0 without tokens.

    Raises:
        ConfigError: another kind, a temperature or chunk that is not positive.
    """
    check_kind(kind, temperature)
    chunks = chunk_sizes(hidden.device, token_chunk, vocab_chunk)
    tiles = slices(weight.shape[0], chunks[1])

    def measured(rows: slice, log_q: Tensor) -> Tensor:
        return _measured(kind, log_q, TopTokens(*(value[rows] for value in teacher)), tiles)

    return swept(hidden, weight, measured, temperature, chunks, precise_dtype(hidden, weight))


def _measured(kind: str, log_q: Tensor, teacher: TopTokens, tiles: Sequence[slice]) -> Tensor:
    """The divergence summed over tokens; log_q (C, V) becomes its gradient with respect to the student's logits."""
    tokens = teacher.tokens.long()
    top = log_q.gather(-1, tokens)
    log_q.scatter_(-1, tokens, -math.inf)
    rest = _log_sum(log_q, tiles).clamp_min_(_NOTHING).unsqueeze(-1)
    # Over k + 1 outcomes, in the words of `_Measure`: the gradient is r - q * centre.
    r = torch.cat((top, rest), -1)
    q = torch.cat((teacher.log_probs, teacher.rest.unsqueeze(-1)), -1).to(r.dtype).clamp_min_(_NOTHING)
    value, centre = MEASURES[kind](r, q)
    if centre is not None:
        r.addcmul_(q, centre.unsqueeze(-1), value=-1)
    # The logit of "any other token" is the log-sum-exp of theirs, whose gradient is the softmax among them.
    for tile in tiles:
        log_q[:, tile].sub_(rest).exp_().mul_(r[:, -1:])
    log_q.scatter_(-1, tokens, r[:, :-1])
    return value.sum()


def _log_sum(values: Tensor, tiles: Sequence[slice]) -> Tensor:
    """(C,) logsumexp of values (C, V), -inf where all are."""
    return torch.stack([values[:, tile].logsumexp(-1) for tile in tiles]).logsumexp(0)
