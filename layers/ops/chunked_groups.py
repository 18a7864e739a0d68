"""What a group of chunks needs that does not depend on the state: decays, scores, the delta rule's inverse.

M = n * B * H matrices for a group of n chunks, as `chunk_layout` has them; formulas and letters as in `chunked`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridvl.layers.ops.chunk_inverse import UnitLowerInverse
from hybridvl.layers.ops.chunk_layout import CHUNK, Chunks, Span, Tokens, Workspace

LOG_ZERO = -40.0  # log decays below this count as -inf: their product would be denormal numbers, which are slow
_ZERO = 4.3e-18  # just above e^-40


class Timeline(NamedTuple):
    """Decays and beta of all chunks, (all M, C, 1) each but for total.

    Attributes:
        high, low: c as the sum of two numbers, so that differences of large c keep their digits.
        start: e^c, from the chunk's start to the token. end: e^(c_C - c), from it to the chunk's end.
        total: (all M, 1, 1) e^(c_C).
    """

    high: Tensor
    low: Tensor
    start: Tensor
    end: Tensor
    total: Tensor
    beta: Tensor

    def of(self, matrices: slice) -> Timeline:
        """The part of some matrices."""
        return Timeline(*(x[matrices] for x in self))


class Sequence(NamedTuple):
    """Tokens chunk by chunk, with the decays and beta of all of them."""

    q: Chunks
    k: Chunks
    v: Chunks
    times: Timeline


class Solution(NamedTuple):
    """What the delta rule solves for: X (M, C, C) and u (M, C, V)."""

    inverse: Tensor
    u: Tensor

    def of(self, matrices: slice) -> Solution:
        """The part of some matrices."""
        return Solution(self.inverse[matrices], self.u[matrices])


@dataclass(frozen=True)
class Group:
    """A group of chunks, loaded, with everything that does not depend on the state.

    Attributes:
        span: its n chunks. scale: s.
        qk: (M, 2C, K) q above k. v: (M, C, V). beta: (M, C, 1). skip: (M, 1, 1), None for none.
        norms: (M, 2C, 1) what q and k were multiplied by to be of unit length, None if they were not.
        start, end, total: as in `Timeline`.
        products: (M, 2C, C) q k^T above k k^T, or (M, C, C) q k^T; overwritten where X is still to be solved.
        decay: (M, C, C) D, lower triangle, diagonal included. scores: (M, C, C) s lower(q k^T) D.
        inverse: (M, C, C) X, None without the delta rule.
        readers: what is multiplied by the state: (M, 2C, K) s e^c q above -beta e^c k, or (M, C, K) s e^c q.
        keys: (M, C, K) e^(c_C - c) k, which is written into the state.
        u: (M, C, V), filled in by `Step.take` unless it has been solved; without the delta rule, beta v.
    """

    span: Span
    scale: float
    work: Workspace
    qk: Tensor
    v: Tensor
    beta: Tensor
    skip: Tensor | None
    norms: Tensor | None
    start: Tensor
    end: Tensor
    total: Tensor
    products: Tensor
    decay: Tensor
    scores: Tensor
    inverse: Tensor | None
    readers: Tensor
    keys: Tensor
    u: Tensor

    def steps(self) -> Iterator[Step]:
        """Its chunks, in order."""
        chunks = self.span.chunks
        inverses = [None] * chunks if self.inverse is None else self.inverse.chunk(chunks)
        parts = (x.chunk(chunks) for x in (self.v, self.beta, self.keys.mT, self.u, self.total))
        return map(Step, inverses, *parts)


class Step(NamedTuple):
    """What leads through a chunk; letters and shapes as in `Group`, the keys transposed, B * H matrices of each."""

    inverse: Tensor | None
    v: Tensor
    beta: Tensor
    keys: Tensor
    u: Tensor
    total: Tensor

    def take(self, state: Tensor, read: Tensor, out: Tensor) -> Tensor:
        """Write u, and into out the state after the chunk, from the state (B * H, K, V) before.

        read: (B * H, C, V) -beta e^c (k S), overwritten; not used without the delta rule.
        """
        if self.inverse is not None:
            torch.bmm(self.inverse, read.addcmul_(self.v, self.beta), out=self.u)
        return torch.bmm(self.keys, self.u, out=out).addcmul_(state, self.total)


def sequence(tokens: Tokens, dtype: torch.dtype) -> Sequence:
    """All tokens, ready to be loaded in groups."""
    return Sequence(Chunks(tokens.q), Chunks(tokens.k), Chunks(tokens.v), _timeline(tokens, dtype))


def _timeline(tokens: Tokens, dtype: torch.dtype) -> Timeline:
    g = tokens.g
    batch, time, heads = g.shape
    chunks = -(-time // CHUNK)
    everything = Span(0, chunks)
    # float64 where there is any: differences of long sums keep their digits beside a strong decay.
    exact = torch.float32 if g.device.type == "mps" else torch.float64
    c = torch.empty(chunks * batch * heads, CHUNK, 1, dtype=exact, device=g.device)
    Chunks(g[..., None]).load(everything, c)
    c = c.clamp_(min=2 * LOG_ZERO).cumsum(1)
    high = c.to(dtype, copy=True)
    low = (c - high).to(dtype)
    start, end, total = (_exp(x.to(dtype, copy=True)) for x in (c, c[:, -1:] - c, c[:, -1:]))
    beta = torch.empty_like(high)
    Chunks(tokens.beta[..., None]).load(everything, beta)
    return Timeline(high, low, start, end, total, beta)


def prepare(
    tokens: Tokens, everything: Sequence, span: Span, work: Workspace, kept: Solution | None, solved: bool
) -> Group:
    """Load a group and compute all that does not depend on the state.

    kept: where X, and later u, are written to be kept, or, when solved, are read; None to keep nothing.
    """
    batch, _, heads, value_dim = tokens.v.shape
    size, key_dim = span.chunks * batch * heads, tokens.k.shape[-1]
    high, low, start, end, total, beta = everything.times.of(span.matrices(batch * heads))
    qk = work.tensor("qk", size, 2 * CHUNK, key_dim)
    q, k = qk[:, :CHUNK], qk[:, CHUNK:]
    v = work.tensor("v", size, CHUNK, value_dim)
    for source, target in zip(everything[:3], (q, k, v), strict=True):
        source.load(span, target)
    norms = None if tokens.unit_eps is None else _normalize(qk, tokens.unit_eps, work)
    decay = _decay(high, low, work)
    rows = 2 * CHUNK if tokens.delta else CHUNK
    products = torch.bmm(qk[:, :rows], k.mT, out=work.tensor("products", size, rows, CHUNK))
    scores = torch.mul(products[:, :CHUNK], decay, out=work.tensor("scores", size, CHUNK, CHUNK)).mul_(tokens.scale)
    readers = work.tensor("readers", size, rows, key_dim)
    _multiply(q, start * tokens.scale, readers[:, :CHUNK])
    inverse, u = kept if kept is not None else (None, work.tensor("u", size, CHUNK, value_dim))
    if tokens.delta:
        _multiply(k, (beta * start).neg_(), readers[:, CHUNK:])
        if not solved:
            # Inverted with its decays: without them the inverse of long keys may overflow where resets keep it small.
            inverse = _inverse(products[:, CHUNK:].mul_(decay).mul_(beta.neg()), work, inverse)
    else:
        torch.mul(v, beta, out=u)
    keys = torch.mul(k, end, out=work.tensor("keys", size, CHUNK, key_dim))
    skip = None if tokens.skip is None else tokens.skip.to(work.dtype).repeat(size // heads)[:, None, None]
    return Group(
        span,
        tokens.scale,
        work,
        qk,
        v,
        beta,
        skip,
        norms,
        start,
        end,
        total,
        products,
        decay,
        scores,
        inverse,
        readers,
        keys,
        u,
    )


def _multiply(left: Tensor, right: Tensor | float, out: Tensor) -> None:
    """Into a slice, which torch.compile takes as the target of a copy, not of a product."""
    if torch.compiler.is_compiling():
        out.copy_(left * right)
    else:
        torch.mul(left, right, out=out)


def _normalize(qk: Tensor, eps: float, work: Workspace) -> Tensor:
    """Bring q and k (M, 2C, K) to unit length in place; the factors (M, 2C, 1)."""
    squares = torch.mul(qk, qk, out=work.tensor("squares", *qk.shape))
    norms = squares.sum(-1, keepdim=True).add_(eps).rsqrt_()
    qk.mul_(norms)
    return norms


def _decay(high: Tensor, low: Tensor, work: Workspace) -> Tensor:
    """D (M, C, C) from the two halves of c (M, C, 1)."""
    decay = work.tensor("decay", high.shape[0], CHUNK, CHUNK)
    # Zeros above the diagonal before exp, which is slow on what overflows, and again after it.
    torch.sub(high, high.mT, out=decay).add_(low).sub_(low.mT).tril_()
    return _exp(decay).tril_()


def _exp(log: Tensor) -> Tensor:
    """exp in place, exactly zero far below one; exp itself is slow on large negative numbers."""
    return F.threshold(log.clamp_(min=LOG_ZERO).exp_(), _ZERO, 0.0, inplace=True)


def _inverse(matrices: Tensor, work: Workspace, kept: Tensor | None) -> Tensor:
    """X of -strict_lower(beta k k^T) D, copied to where it is kept."""
    solver = work.once(("inverse", matrices.shape[0]), lambda: UnitLowerInverse(matrices, work))
    inverse = solver.solve()
    return inverse if kept is None else kept.copy_(inverse)
