"""Softmax attention along a band, block of queries by block of queries, with its own backward pass.

Every block of b queries meets one slice of keys that holds all that they see, at most W - 1 + b of them, so that the
softmax of a block is whole: nothing is kept for the backward pass but the inputs, and each block is computed again
there. The G query heads that share a key head are rows of one matrix product; no head is repeated. Scores, softmax and
sums are in float32 or float64; with narrower inputs the products that give gradients take their factors as narrow as
the inputs are, unless their results would then be further off than those of PyTorch's fused attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridvl.layers.ops.bands import ALIGNMENT, BLOCK, Block, Run, band_runs
from hybridvl.layers.ops.checks import full_precision, internal_dtype

_CAPABILITIES = dict(torch.cpu.get_capabilities()) if hasattr(torch.cpu, "get_capabilities") else {}
_MATRIX_UNIT = _CAPABILITIES.get("amx_bf16") is True
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
        kind = _FusedUnit if _fuses(q) else _Unit
        with full_precision(q.device):
            for rows, heads, shared in _parts(q, k, window):
                unit = kind(q[rows, :, heads], k[rows, :, shared], v[rows, :, shared], window, scale)
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
        kind = _FusedUnit if _fuses(q) else _Unit
        with full_precision(q.device):
            for rows, heads, shared in _parts(q, k, window):
                unit = kind(q[rows, :, heads], k[rows, :, shared], v[rows, :, shared], window, scale)
                unit.real = None if real is None else real[rows]
                unit.differentiate(
                    runs, grad[rows, :, heads], dq[rows, :, heads], dk[rows, :, shared], dv[rows, :, shared]
                )
        return dq, dk, dv, None, None, None, None


def _fuses(q: Tensor) -> bool:
    narrow = q.device.type == "cpu" and q.dtype == torch.bfloat16
    return narrow and _MATRIX_UNIT and not torch.compiler.is_compiling()


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


class _Both(NamedTuple):
    """A tensor in the dtype of the inputs and in that of the scores."""

    narrow: Tensor
    wide: Tensor

    def part(self, at: slice) -> _Both:
        """Some of its keys."""
        return _Both(self.narrow[:, at], self.wide[:, at])


class _Unit:
    """The attention of R rows and J key heads, each with G query heads; U = R J products at once."""

    widens = True

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
            keys, values = self._flat("keys", self.k, run), self._flat("values", self.v, run)
            for block in run.blocks:
                at = slice(block.first - run.first, block.last - run.first)
                query = self._queries("query", self.q, block)
                self._store(self._output(query, keys.part(at), values.part(at), block), out, block)

    def differentiate(self, runs: list[Run], grad: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Write the gradients of q, k and v under grad (R, T, J G, V)."""
        sums: tuple[Tensor, Tensor] | None = None
        for index, run in enumerate(runs):
            keys, values = self._flat("keys", self.k, run), self._flat("values", self.v, run)
            sums = self._sums(sums, runs[index - 1] if index else None, run)
            for block in run.blocks:
                at = slice(block.first - run.first, block.last - run.first)
                query, upstream = self._queries("query", self.q, block), self._queries("grad", grad, block)
                totals = sums[0][:, at], sums[1][:, at]
                self._store(self._gradients(query, keys.part(at), values.part(at), upstream, totals, block), dq, block)
            until = runs[index + 1].first if index + 1 < len(runs) else run.last
            for total, target in zip(sums, (dk, dv), strict=True):
                done = total[:, : until - run.first].unflatten(0, (self.rows, self.heads))
                target[:, run.first : until].copy_(done.transpose(1, 2))

    def _output(self, query: _Both, keys: _Both, values: _Both, block: Block) -> Tensor:
        """The output (U, b G, V) of a block."""
        weights = self._weigh(query, keys, block)
        found = self._take("found", self.wide, *query.wide.shape[:2], values.wide.shape[2])
        return torch.bmm(weights, values.wide, out=found)

    def _gradients(
        self, query: _Both, keys: _Both, values: _Both, grad: _Both, totals: tuple[Tensor, Tensor], block: Block
    ) -> Tensor:
        """The gradient of a block's queries (U, b G, K); those of keys and values are added to the totals (U, n, .)."""
        weights = self._weigh(query, keys, block)
        slopes = torch.bmm(grad.wide, values.wide.mT, out=self._take("slopes", self.wide, *weights.shape))
        torch.ops.aten._softmax_backward_data.out(slopes, weights, -1, self.wide, grad_input=slopes)
        low_slopes = self._narrowed("slopes", slopes)
        if self.group == 1:
            self._add(totals[0], slopes, query.wide, self.scale)
            self._add(totals[1], weights, grad.wide, 1.0)
        else:
            self._add(totals[0], low_slopes, query.narrow, self.scale)
            self._add(totals[1], self._narrowed("weights", weights), grad.narrow, 1.0)
        found = self._take("found", self.narrow, *query.narrow.shape)
        return torch.baddbmm(found, low_slopes, keys.narrow, beta=0, alpha=self.scale, out=found)

    def _add(self, total: Tensor, weights: Tensor, rows: Tensor, factor: float) -> None:
        """total += factor weights^T rows."""
        if rows.dtype != self.wide:
            out = self._take("added", rows.dtype, *total.shape)
            total.add_(torch.baddbmm(out, weights.mT, rows, beta=0, alpha=factor, out=out))
        elif torch.compiler.is_compiling():  # takes no strided `out`
            total.baddbmm_(weights.mT, rows, alpha=factor)
        else:
            torch.baddbmm(total, weights.mT, rows, alpha=factor, out=total)

    def _weigh(self, query: _Both, keys: _Both, block: Block) -> Tensor:
        """softmax of the scores (U, G b, n) of a block."""
        size, count = block.stop - block.start, block.last - block.first
        scores = self._take("scores", self.wide, *query.wide.shape[:2], count)
        torch.baddbmm(scores, query.wide, keys.wide.mT, beta=0, alpha=self.scale, out=scores)
        self._hide(scores.view(self.rows, self.heads, size, self.group, count), block)
        return torch.softmax(scores, -1, out=scores)

    def _hide(self, pairs: Tensor, block: Block) -> None:
        """Make scores (R, J, b, G, n) of a block -inf where the query does not see the key; axes but b, n may be 1."""
        size, count = block.stop - block.start, block.last - block.first
        pairs[..., count - size :].add_(self._later[:size, :, :size])
        # The window of the block's first query begins `lead` keys after the slice, or before it.
        lead = self.offset + block.start - self.width + 1 - block.first
        edge = min(size + lead, count)
        if edge > 0:
            pairs[..., :edge].add_(self._earlier[:size, :, ALIGNMENT - lead : ALIGNMENT - lead + edge])
        for boundary in block.boundaries:
            pairs[:, :, boundary - block.start :, :, : boundary - block.first] = -math.inf
        if self.real is not None:
            pairs.masked_fill_(~self.real[:, None, None, None, block.first : block.last], _HIDDEN)

    def _sums(self, sums: tuple[Tensor, Tensor] | None, before: Run | None, run: Run) -> tuple[Tensor, Tensor]:
        """Sums for the gradients of a run's keys and values, begun with what the run before found for both."""
        shape = (self.rows * self.heads, run.last - run.first)
        fresh = tuple(self.k.new_zeros(*shape, x.shape[3], dtype=self.wide) for x in (self.k, self.v))
        if sums is not None and before is not None and before.last > run.first:
            shared = before.last - run.first
            for total, old in zip(fresh, sums, strict=True):
                total[:, :shared] = old[:, run.first - before.first :]
        return fresh[0], fresh[1]

    def _flat(self, name: str, x: Tensor, run: Run) -> _Both:
        """The keys of a run out of x (R, S, J, D) as (U, n, D), each matrix contiguous."""
        x = x[:, run.first : run.last].transpose(1, 2)  # (R, J, n, D)
        if x.stride(3) == 1 and x.stride(2) == x.shape[3] and 1 in x.shape[:2]:
            return self._both(name, x.flatten(0, 1))  # where they are: a head's keys lie together
        flat = self._take(name, x.dtype, self.rows * self.heads, *x.shape[2:])
        flat.view(x.shape).copy_(x)
        return self._both(name, flat)

    def _queries(self, name: str, x: Tensor, block: Block) -> _Both:
        """A block of x (R, T, J G, D) as (U, b G, D), contiguous."""
        size = block.stop - block.start
        flat = self._take(name, x.dtype, self.rows * self.heads, size * self.group, x.shape[3])
        flat.view(self.rows, self.heads, size, self.group, x.shape[3]).copy_(self._grouped(x, block))
        return self._both(name, flat)

    def _store(self, flat: Tensor, x: Tensor, block: Block) -> None:
        """The inverse of `_queries`."""
        self._grouped(x, block).copy_(flat.view(self.rows, self.heads, -1, self.group, x.shape[3]))

    def _grouped(self, x: Tensor, block: Block) -> Tensor:
        return x[:, block.start : block.stop].unflatten(2, (self.heads, self.group)).transpose(1, 2)

    def _both(self, name: str, x: Tensor) -> _Both:
        if x.dtype == self.wide or not self.widens:
            return _Both(x, x)
        return _Both(x, self._take(f"wide {name}", self.wide, *x.shape).copy_(x))

    def _narrowed(self, name: str, x: Tensor) -> Tensor:
        return x if x.dtype == self.narrow else self._take(f"narrow {name}", self.narrow, *x.shape).copy_(x)

    def _take(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """A contiguous view of the scratch of that name, whose old content is lost."""
        size = math.prod(shape)
        if name not in self._scratch or self._scratch[name].numel() < size:
            self._scratch[name] = self.q.new_empty(size, dtype=dtype)
        return self._scratch[name][:size].view(shape)


class _FusedUnit(_Unit):
    """Blocks by SDPA, for processors whose bfloat16 products are several times faster than those in float32."""

    widens = False
    _mask: Tensor
    _masked: tuple[int, int, int] | None = None

    def _output(self, query: _Both, keys: _Both, values: _Both, block: Block) -> Tensor:
        return self._fused((query.narrow, keys.narrow, values.narrow), block)

    def _gradients(
        self, query: _Both, keys: _Both, values: _Both, grad: _Both, totals: tuple[Tensor, Tensor], block: Block
    ) -> Tensor:
        with torch.enable_grad():
            leaves = [x.narrow.detach().requires_grad_() for x in (query, keys, values)]
            found, for_keys, for_values = torch.autograd.grad(self._fused(leaves, block), leaves, grad.narrow)
        totals[0].add_(for_keys)
        totals[1].add_(for_values)
        return found

    def _fused(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        size, count = block.stop - block.start, block.last - block.first
        # Blocks inside a row are all alike: their mask is made once.
        shape = (size, count, self.offset + block.start - block.first)
        if self.real is not None or block.boundaries or shape != self._masked:
            pairs = self.q.new_zeros(1 if self.real is None else self.rows, 1, size, 1, count)
            self._hide(pairs, block)
            self._mask = pairs.expand(-1, -1, -1, self.group, -1).flatten(2, 3)  # (R, 1, b G, n)
            self._masked = None if block.boundaries else shape
        query, keys, values = (x.unflatten(0, (self.rows, self.heads)) for x in inputs)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=self._mask, scale=self.scale).flatten(0, 1)
