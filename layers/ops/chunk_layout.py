"""Tokens in chunks as batches of small matrices, and the buffers for them.

A group of n chunks of C tokens is M = n * B * H matrices, chunk by chunk, so that a chunk's matrices lie side by side.
All of a group's numbers live in buffers that the next group uses again: on a CPU, touching fresh memory costs more than
the arithmetic on it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 32
_GROUP_NUMBERS = 3 << 16  # of numbers in a group's v, about: small enough for all its buffers to stay in cache


class Workspace:
    """Uninitialised buffers by name, made once and handed out again."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._buffers: dict[str, Tensor] = {}

    def tensor(self, name: str, *shape: int) -> Tensor:
        """The buffer of a name in a shape, with whatever it holds; the first request decides the capacity."""
        count = torch.Size(shape).numel()
        held = self._buffers.get(name)
        if held is None or held.numel() < count:
            held = self._buffers[name] = torch.empty(count, dtype=self.dtype, device=self.device)
        return held[:count].view(shape)


class Tokens(NamedTuple):
    """The arguments of `chunked_recurrence`, the state aside."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    skip: Tensor | None
    scale: float
    delta: bool
    unit_eps: float | None


class Span(NamedTuple):
    """Consecutive chunks: the first token, and how many chunks; the last may reach beyond the last token."""

    first: int
    chunks: int

    def matrices(self, rows: int) -> slice:
        """Its place among the matrices of all chunks, of which each has rows = B * H."""
        start = self.first // CHUNK * rows
        return slice(start, start + self.chunks * rows)


def cut(tokens: Tokens) -> list[Span]:
    """The groups, in order."""
    batch, time, heads, value_dim = tokens.v.shape
    chunks = -(-time // CHUNK)
    numbers = batch * heads * CHUNK * max(tokens.k.shape[-1], value_dim)
    size = min(max(round(_GROUP_NUMBERS / numbers), 1), chunks)
    return [Span(first * CHUNK, min(size, chunks - first)) for first in range(0, chunks, size)]


def load(x: Tensor, span: Span, out: Tensor) -> None:
    """Copy the tokens of a span of x (B, T, H', ...) into out (M, C, ...): zeros beyond T, heads repeated."""
    batch, time, heads = x.shape[:3]
    target = out.unflatten(0, (span.chunks, batch, heads, -1))
    whole = min((time - span.first) // CHUNK, span.chunks)
    if whole:
        target[:whole].copy_(_by_chunk(x, span.first, whole))
    if whole < span.chunks:
        rest = x[:, span.first + whole * CHUNK :]  # (B, R, H', ...)
        target[whole, :, :, :, rest.shape[1] :].zero_()
        target[whole, :, :, :, : rest.shape[1]].copy_(rest.transpose(1, 2).unsqueeze(2))


def store(matrices: Tensor, span: Span, out: Tensor) -> None:
    """The inverse of `load`, from (M, C, ...) into out (B, T, H', ...); repeated heads are summed."""
    batch, time, heads = out.shape[:3]
    source = matrices.unflatten(0, (span.chunks, batch, heads, -1))
    source = source.sum(3, keepdim=True) if source.shape[3] > 1 else source
    whole = min((time - span.first) // CHUNK, span.chunks)
    if whole:
        _by_chunk(out, span.first, whole).copy_(source[:whole])
    if whole < span.chunks:
        rest = out[:, span.first + whole * CHUNK :]
        rest.copy_(source[whole, :, :, 0, : rest.shape[1]].transpose(1, 2))


def _by_chunk(x: Tensor, first: int, whole: int) -> Tensor:
    """A view (n, B, H', 1, C, ...) of n whole chunks of x (B, T, H', ...)."""
    chunks = x[:, first : first + whole * CHUNK].unflatten(1, (whole, CHUNK))  # (B, n, C, H', ...)
    return chunks.permute(1, 0, 3, 2, *range(4, chunks.ndim)).unsqueeze(3)
