"""Tokens in chunks as batches of small matrices, and the buffers for them.

A group of n chunks of C tokens is M = n * B * H matrices, chunk by chunk, so that a chunk's matrices lie side by side.
All of a group's numbers live in buffers that the next group uses again: on a CPU, touching fresh memory costs more than
the arithmetic on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")

CHUNK = 32
_GROUP_NUMBERS = 3 << 16  # of numbers in a group's v, about: small enough for all its buffers to stay in cache


class Workspace:
    """Uninitialised buffers by name, made once and handed out again."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._buffers: dict[str, Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._made: dict[tuple[str, int], Any] = {}

    def tensor(self, name: str, *shape: int) -> Tensor:
        """The buffer of a name in a shape, with whatever it holds."""
        view = self._views.get((name, shape))
        if view is None:
            count = torch.Size(shape).numel()
            held = self._buffers.get(name)
            if held is None or held.numel() < count:
                held = self._buffers[name] = torch.empty(count, dtype=self.dtype, device=self.device)
            view = self._views[name, shape] = held[:count].view(shape)
        return view

    def once(self, name: tuple[str, int], make: Callable[[], Made]) -> Made:
        """What `make` made when the name was first asked for."""
        if name not in self._made:
            self._made[name] = make()
        made: Made = self._made[name]
        return made


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
    """Consecutive chunks: the first, and how many; the last may reach beyond the last token."""

    first: int
    chunks: int

    def matrices(self, rows: int) -> slice:
        """Its place among the matrices of all chunks, of which each has rows = B * H."""
        return slice(self.first * rows, (self.first + self.chunks) * rows)

    @property
    def slice(self) -> slice:
        """Its place among all chunks."""
        return self.matrices(1)


def cut(tokens: Tokens) -> list[Span]:
    """The groups, in order."""
    batch, time, heads, value_dim = tokens.v.shape
    chunks = -(-time // CHUNK)
    numbers = batch * heads * CHUNK * max(tokens.k.shape[-1], value_dim)
    size = min(max(round(_GROUP_NUMBERS / numbers), 1), chunks)
    return [Span(first, min(size, chunks - first)) for first in range(0, chunks, size)]


class Chunks:
    """A tensor x (B, T, H', ...) as the chunks that it consists of."""

    def __init__(self, x: Tensor) -> None:
        self.tensor = x
        whole = x.shape[1] // CHUNK
        split = x[:, : whole * CHUNK].unflatten(1, (whole, CHUNK))  # (B, n, C, H', ...)
        self._whole = split.permute(1, 0, 3, 2, *range(4, split.ndim)).unsqueeze(3)  # (n, B, H', 1, C, ...)
        self._rest = x[:, whole * CHUNK :].transpose(1, 2).unsqueeze(2)  # (B, H', 1, R, ...)

    def load(self, span: Span, out: Tensor) -> None:
        """Copy the tokens of a span into out (M, C, ...): zeros beyond T, heads repeated."""
        source, target = self._whole[span.slice], self._matrices(out, span)
        whole = source.shape[0]
        if whole == span.chunks:
            target.copy_(source)
            return
        target[:whole].copy_(source)
        time = self._rest.shape[3]
        target[whole, :, :, :, time:].zero_()
        target[whole, :, :, :, :time].copy_(self._rest)

    def store(self, matrices: Tensor, span: Span) -> None:
        """The inverse of `load`, from (M, C, ...) into x; repeated heads are summed."""
        target, source = self._whole[span.slice], self._matrices(matrices, span)
        if source.shape[3] > 1:
            source = source.sum(3, keepdim=True)
        whole = target.shape[0]
        if whole == span.chunks:
            target.copy_(source)
            return
        target.copy_(source[:whole])
        self._rest.copy_(source[whole, :, :, :, : self._rest.shape[3]])

    def _matrices(self, matrices: Tensor, span: Span) -> Tensor:
        """(M, C, ...) as (n, B, H', repeats, C, ...)."""
        batch, _, heads = self.tensor.shape[:3]
        return matrices.view(span.chunks, batch, heads, -1, *matrices.shape[1:])
