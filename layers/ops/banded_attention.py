"""Softmax attention along a band, block of queries by block of queries, with its own backward pass.

Every block of b queries meets one slice of keys that holds all that they see, at most W - 1 + b of them, so that the
softmax of a block is whole: nothing is kept for the backward pass but the inputs, and each block is computed again
there. The G query heads that share a key head are rows of one matrix product; no head is repeated. Scores, softmax and
sums are in float32 or float64; with narrower inputs the products that give gradients take their factors as narrow as
the inputs are, unless their results would then be further off than those of PyTorch's fused attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridvl.layers.ops.bands import ALIGNMENT, BLOCK, Block, Run, band_runs
from hybridvl.layers.ops.checks import full_precision, internal_dtype

_SCORES = 1 << 20  # scores in scratch, about
_HIDDEN = -1e30  # the score of padding: finite, so that a query that sees nothing else has weights, zeroed afterwards


def banded_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, real: Tensor | None = None, bounds: tuple[int, ...] = ()
) -> Tensor:
    """As `attention` with a window; real is its key_padding_mask, bounds are its cu_seqlens on the host."""
    output: Tensor = _Banded.apply(q, k, v, real, window, scale, bounds)
    return output


class _Banded(torch.autograd.Function):
    """q (B, T, H, K), k (B, S, Hkv, K), v (B, S, Hkv, V) -> (B, T, H, V)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        real: Tensor | None,
        window: int,
        scale: float,
        bounds: tuple[int, ...],
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, real)
        ctx.options = window, scale, bounds
        out = q.new_empty(*q.shape[:3], v.shape[3])
        runs = band_runs(q.shape[1], k.shape[1], window, bounds)
        with full_precision(q.device):
            for rows, heads, shared in _parts(q, k, window):
                unit = _Unit(q[rows, :, heads], k[rows, :, shared], v[rows, :, shared], window, scale)
                unit.real = None if real is None else real[rows]
                unit.attend(runs, out[rows, :, heads])
        return out if real is None else out.masked_fill_(~_seeing(real, q.shape[1], window), 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, real = ctx.saved_tensors
        window, scale, bounds = ctx.options
        if real is not None:
            grad = grad.masked_fill(~_seeing(real, q.shape[1], window), 0)
        runs = band_runs(q.shape[1], k.shape[1], window, bounds)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        with full_precision(q.device):
            for rows, heads, shared in _parts(q, k, window):
                unit = _Unit(q[rows, :, heads], k[rows, :, shared], v[rows, :, shared], window, scale)
                unit.real = None if real is None else real[rows]
                unit.differentiate(
                    runs, grad[rows, :, heads], dq[rows, :, heads], dk[rows, :, shared], dv[rows, :, shared]
                )
        return dq, dk, dv, None, None, None, None


def _seeing(real: Tensor, queries: int, window: int) -> Tensor:
    """(B, T, 1, 1) bool: which queries see a real key."""
    keys = real.shape[1]
    count = F.pad(real.cumsum(1), (1, 0))  # (B, S + 1) real keys before each
    stop = torch.arange(keys - queries + 1, keys + 1, device=real.device)
    return (count[:, stop] > count[:, (stop - window).clamp(min=0)])[..., None, None]


def _parts(q: Tensor, k: Tensor, window: int) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of the rows, the query heads and the key heads whose scores of a block fit the scratch together."""
    rows, keys, kv_heads = k.shape[:3]
    group = q.shape[2] // kv_heads
    fitting = max(_SCORES // (group * BLOCK * (min(window, keys) + BLOCK)), 1)
    some_rows, some = max(fitting // kv_heads, 1), min(fitting, kv_heads)
    for row in range(0, rows, some_rows):
        for head in range(0, kv_heads, some):
            yield slice(row, row + some_rows), slice(head * group, (head + some) * group), slice(head, head + some)


class _Unit:
    """The attention of R rows and J key heads, each with G query heads; U = R J products at once."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> None:
        self.q, self.k, self.v, self.scale = q, k, v, scale
        self.real: Tensor | None = None
        self.width = min(window, k.shape[1])
        self.offset = k.shape[1] - q.shape[1]
        self.rows, self.heads, self.group = k.shape[0], k.shape[2], q.shape[2] // k.shape[2]
        self.narrow, self.wide = q.dtype, internal_dtype(q, k, v)
        self._scratch: dict[str, Tensor] = {}
        hidden = torch.full((BLOCK, 1, BLOCK + ALIGNMENT), -math.inf, dtype=self.wide, device=q.device)
        self._later = hidden[:, 0, :BLOCK].triu(1)[:, None]  # hides key j > query i, both counted from the same token
        self._earlier = hidden[:, 0].tril(ALIGNMENT - 1)[:, None]  # hides key j - ALIGNMENT < query i

    def attend(self, runs: list[Run], out: Tensor) -> None:
        """Write the outputs into out (R, T, J G, V)."""
        for run in runs:
            keys = self._widened("keys", self._flat("keys", self.k[:, run.first : run.last]))
            values = self._widened("values", self._flat("values", self.v[:, run.first : run.last]))  # (U, n, V)
            for block in run.blocks:
                at = slice(block.first - run.first, block.last - run.first)
                query = self._widened("query", self._queries("query", self.q, block))
                weights = self._weigh(query, keys[:, at], block)
                found = self._take("found", self.wide, *query.shape[:2], values.shape[2])
                self._store(torch.bmm(weights, values[:, at], out=found), out, block)

    def differentiate(self, runs: list[Run], grad: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Write the gradients of q, k and v under grad (R, T, J G, V)."""
        sums: tuple[Tensor, Tensor] | None = None
        for index, run in enumerate(runs):
            low_keys = self._flat("keys", self.k[:, run.first : run.last])
            keys = self._widened("keys", low_keys)
            values = self._widened("values", self._flat("values", self.v[:, run.first : run.last]))
            sums = self._sums(sums, runs[index - 1] if index else None, run)
            for block in run.blocks:
                at = slice(block.first - run.first, block.last - run.first)
                low_query, low_grad = self._queries("query", self.q, block), self._queries("grad", grad, block)
                query, into = self._widened("query", low_query), self._widened("grad", low_grad)
                weights = self._weigh(query, keys[:, at], block)
                slopes = torch.bmm(into, values[:, at].mT, out=self._take("slopes", self.wide, *weights.shape))
                torch.ops.aten._softmax_backward_data.out(slopes, weights, -1, self.wide, grad_input=slopes)
                low_slopes = self._narrowed("slopes", slopes)
                if self.group == 1:
                    for_values, for_keys = torch.bmm(weights.mT, into), torch.bmm(slopes.mT, query)
                else:
                    weights = self._narrowed("weights", weights)
                    for_values, for_keys = torch.bmm(weights.mT, low_grad), torch.bmm(low_slopes.mT, low_query)
                sums[1][:, at].add_(for_values)
                sums[0][:, at].add_(for_keys, alpha=self.scale)
                found = self._take("found", self.narrow, *query.shape)
                torch.baddbmm(found, low_slopes, low_keys[:, at], beta=0, alpha=self.scale, out=found)
                self._store(found, dq, block)
            until = runs[index + 1].first if index + 1 < len(runs) else run.last
            for total, target in zip(sums, (dk, dv), strict=True):
                done = total[:, : until - run.first].unflatten(0, (self.rows, self.heads))
                target[:, run.first : until].copy_(done.transpose(1, 2))

    def _weigh(self, query: Tensor, keys: Tensor, block: Block) -> Tensor:
        """softmax of the scores (U, G b, n) of a block."""
        size, count = block.stop - block.start, block.last - block.first
        scores = self._take("scores", self.wide, *query.shape[:2], count)
        torch.baddbmm(scores, query, keys.mT, beta=0, alpha=self.scale, out=scores)
        pairs = scores.unflatten(1, (size, self.group))  # (U, b, G, n)
        pairs[..., count - size :].add_(self._later[:size, :, :size])
        # The window of the block's first query begins `lead` keys after the slice, or before it.
        lead = self.offset + block.start - self.width + 1 - block.first
        edge = min(size + lead, count)
        if edge > 0:
            pairs[..., :edge].add_(self._earlier[:size, :, ALIGNMENT - lead : ALIGNMENT - lead + edge])
        for boundary in block.boundaries:
            pairs[:, boundary - block.start :, :, : boundary - block.first] = -math.inf
        if self.real is not None:
            padding = ~self.real[:, None, None, block.first : block.last]
            scores.unflatten(0, (self.rows, self.heads)).masked_fill_(padding, _HIDDEN)
        return torch.softmax(scores, -1, out=scores)

    def _sums(self, sums: tuple[Tensor, Tensor] | None, before: Run | None, run: Run) -> tuple[Tensor, Tensor]:
        """Sums for the gradients of a run's keys and values, begun with what the run before found for both."""
        shape = (self.rows * self.heads, run.last - run.first)
        fresh = tuple(self.k.new_zeros(*shape, x.shape[3], dtype=self.wide) for x in (self.k, self.v))
        if sums is not None and before is not None and before.last > run.first:
            shared = before.last - run.first
            for total, old in zip(fresh, sums, strict=True):
                total[:, :shared] = old[:, run.first - before.first :]
        return fresh[0], fresh[1]

    def _flat(self, name: str, x: Tensor) -> Tensor:
        """x (R, n, J, D) as (U, n, D), contiguous."""
        flat = self._take(name, x.dtype, self.rows * self.heads, x.shape[1], x.shape[3])
        flat.view(self.rows, self.heads, *flat.shape[1:]).copy_(x.transpose(1, 2))
        return flat

    def _queries(self, name: str, x: Tensor, block: Block) -> Tensor:
        """A block of x (R, T, J G, D) as (U, b G, D), contiguous."""
        size = block.stop - block.start
        flat = self._take(name, x.dtype, self.rows * self.heads, size * self.group, x.shape[3])
        flat.view(self.rows, self.heads, size, self.group, x.shape[3]).copy_(self._grouped(x, block))
        return flat

    def _store(self, flat: Tensor, x: Tensor, block: Block) -> None:
        """The inverse of `_queries`."""
        self._grouped(x, block).copy_(flat.view(self.rows, self.heads, -1, self.group, x.shape[3]))

    def _grouped(self, x: Tensor, block: Block) -> Tensor:
        return x[:, block.start : block.stop].unflatten(2, (self.heads, self.group)).transpose(1, 2)

    def _widened(self, name: str, x: Tensor) -> Tensor:
        return x if x.dtype == self.wide else self._take(f"wide {name}", self.wide, *x.shape).copy_(x)

    def _narrowed(self, name: str, x: Tensor) -> Tensor:
        return x if x.dtype == self.narrow else self._take(f"narrow {name}", self.narrow, *x.shape).copy_(x)

    def _take(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """A contiguous view of the scratch of that name, whose old content is lost."""
        size = math.prod(shape)
        if name not in self._scratch or self._scratch[name].numel() < size:
            self._scratch[name] = self.q.new_empty(size, dtype=dtype)
        return self._scratch[name][:size].view(shape)
