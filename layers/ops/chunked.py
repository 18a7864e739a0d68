"""The chunk-parallel form of the decayed linear recurrences (gated delta rule, SSD), with its own backward pass.

Notation, within a chunk of C tokens that starts at state S (K, V), c = cumulated log decay, D[i, j] = e^(c_i - c_j):

    u = X (beta v - beta e^c (k S))        X = (I + strict_lower(beta k k^T) D)^-1, or u = v without the delta rule
    o = e^c (q S) + lower(q k^T) D u       S' = e^(c_C) S + (e^(c_C - c) k)^T u

(Yang, Kautz, Hatamizadeh 2024, arXiv 2412.06464, section 3; Dao, Gu 2024, arXiv 2405.21060, section 6.) Everything but
the product with S is done for many chunks at once. The backward pass keeps the state at the start of every group of
chunks and recomputes the rest.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridvl.layers.ops.checks import full_precision, internal_dtype

CHUNK = 32
_GROUP_NUMBERS = 1 << 19  # of numbers in a group's largest buffer: 2 MB in float32, so that it stays in cache
_LOG_ZERO = -40.0  # log decays below this count as -inf: exp gives an exact zero instead of slow denormals


class _Inputs(NamedTuple):
    """A group of n chunks as (n * B * H, C, ...) matrices; q is scaled, c is (n * B * H, C) in float64."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None  # (n * B * H, C, 1)
    c: Tensor


class _Parts(NamedTuple):
    """What a group's outputs and gradients are made of; M = n * B * H."""

    decay: Tensor  # (M, C, C) D, lower triangle, diagonal included
    start: Tensor  # (M, C, 1) e^c: from the chunk's start to the token
    end: Tensor  # (M, C, 1) e^(c_C - c): from the token to the chunk's end
    total: Tensor  # (M, 1, 1) e^(c_C)
    scores: Tensor  # (M, C, C) lower(q k^T) D
    overlap: Tensor | None  # (M, C, C) strict_lower(k k^T) D
    inverse: Tensor | None  # (M, C, C) X
    reader: Tensor | None  # (M, C, K) X (beta e^c k): u = X beta v - reader S
    u: Tensor  # (M, C, V), complete after the scan
    states: Tensor  # (M, K, V) the state at each chunk's start
    final: Tensor  # (B * H, K, V)


def chunked_recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """o and the final state of the delta rule, or without beta of S = e^g S + k v^T; o = scale q S.

    q, k: (B, T, Hk, K), head h of v uses head h // (H / Hk). v: (B, T, H, V). g, beta: (B, T, H). state: (B, H, K, V).
    Returns o (B, T, H, V) in v's dtype and the final state in float32 (float64 if any input is). Differentiable once.
    """
    if not v.numel():  # no rows or no tokens
        return torch.zeros_like(v), state.to(internal_dtype(q, k, v, g, beta, state))
    o, final = _Recurrence.apply(q, k, v, g, beta, state, scale)
    return o, final


def chunked_recurrence_flops(rows: int, tokens: int, key_dim: int, value_dim: int, delta: bool) -> int:
    """Matrix-product FLOPs (2 per multiply-add) of a forward pass over rows = B * H sequences of T tokens."""
    square = CHUNK * CHUNK * (key_dim + value_dim)  # multiply-adds of the scores, and of scores times u
    through_state = 2 * CHUNK * key_dim * value_dim
    if delta:
        square += CHUNK * CHUNK * (2 * key_dim + value_dim)  # overlap, reader, u
        through_state += CHUNK * key_dim * value_dim
        half = 2
        while half < CHUNK:
            square += CHUNK * half * half
            half *= 2
    return 2 * rows * -(-tokens // CHUNK) * (square + through_state)


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, state: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        with full_precision(q.device):
            dtype = internal_dtype(q, k, v, g, beta, state)
            groups = _groups(k, v)
            o = _padded_like(v)
            current = state.to(dtype).flatten(0, 1)
            starts = []
            for group in groups:
                starts.append(current)
                inputs = _inputs(q, k, v, g, beta, scale, group, dtype)
                parts = _forward(inputs, current)
                current = parts.final
                inter = (inputs.q * parts.start) @ parts.states
                _write(o, _add_product(inter, parts.scores, parts.u), group)
            ctx.save_for_backward(q, k, v, g, beta, state, torch.stack(starts))
            ctx.groups, ctx.scale, ctx.dtype = groups, scale, dtype
            return o[:, : v.shape[1]], current.view(state.shape).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, beta, state, starts = ctx.saved_tensors
        with full_precision(q.device):
            dq, dk, dv, dg = (_padded_like(x) for x in (q, k, v, g))
            dbeta = None if beta is None else _padded_like(beta)
            dstate = dfinal.to(ctx.dtype).flatten(0, 1).clone()
            for group, start in reversed(list(zip(ctx.groups, starts, strict=True))):
                inputs = _inputs(q, k, v, g, beta, ctx.scale, group, ctx.dtype)
                grads, dstate = _backward(
                    inputs, _forward(inputs, start), _chunks(do, group, v.shape[2], ctx.dtype), dstate
                )
                _write(dq, grads.q.mul_(ctx.scale), group)
                _write(dk, grads.k, group)
                _write(dv, grads.v, group)
                _write(dg, grads.c, group)
                if dbeta is not None and grads.beta is not None:
                    _write(dbeta, grads.beta.squeeze(-1), group)
            tokens = q.shape[1]
            # A clipped decay is constant: only rounding noise is left of its gradient.
            dg = dg[:, :tokens].masked_fill_(g < _LOG_ZERO, 0.0)
            dbeta = None if dbeta is None else dbeta[:, :tokens]
            dstate = dstate.view(state.shape).to(state.dtype)
            return dq[:, :tokens], dk[:, :tokens], dv[:, :tokens], dg, dbeta, dstate, None


def _forward(inputs: _Inputs, state: Tensor) -> _Parts:
    q, k, v, beta, c = inputs
    chunks, rows = c.shape[0] // state.shape[0], state.shape[0]
    decay = _exp((c[:, :, None] - c[:, None, :]).to(q.dtype).masked_fill_(_upper(c), float("-inf")))
    start, end, total = (_exp(x.to(q.dtype, copy=True)) for x in (c, c[:, -1:] - c, c[:, -1:]))
    start, end, total = start[..., None], end[..., None], total[..., None]
    scores = (q @ k.mT).mul_(decay)
    overlap = inverse = reader = None
    u = v
    if beta is not None:
        overlap = (k @ k.mT).mul_(decay).tril_(-1)
        # Inverted with its decays: without them the inverse of long keys may overflow where resets keep it small.
        inverse = _unit_lower_inverse(overlap * beta)
        u = inverse @ (v * beta)
        reader = inverse @ (k * (beta * start))
    keys = (k * end).mT
    states = torch.empty(chunks + 1, *state.shape, dtype=state.dtype, device=state.device)
    states[0].copy_(state)
    for n in range(chunks):
        at = slice(n * rows, (n + 1) * rows)
        if reader is not None:
            _add_product(u[at], reader[at], states[n], factor=-1)
        _add_product(states[n + 1].copy_(states[n]).mul_(total[at]), keys[at], u[at])
    return _Parts(decay, start, end, total, scores, overlap, inverse, reader, u, states[:-1].flatten(0, 1), states[-1])


class _Grads(NamedTuple):
    """Gradients of a group's inputs; c's is already that of g, (M, C)."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None
    c: Tensor


def _backward(inputs: _Inputs, parts: _Parts, do: Tensor, dfinal: Tensor) -> tuple[_Grads, Tensor]:
    """Gradients from do (M, C, V) and the final state's (B * H, K, V); second, the initial state's."""
    q, k, v, beta, _ = inputs
    du, dstates, dstate = _scan_back(inputs, parts, do, dfinal)
    inner = (do @ parts.u.mT).mul_(parts.decay)  # of lower(q k^T)
    through_start = (do @ parts.states.mT).mul_(parts.start)
    through_end = (parts.u @ dstates.mT).mul_(parts.end)
    dq = _add_product(through_start, inner, k)
    dk = torch.baddbmm(through_end, inner.mT, q)  # k as it is written into the state
    dv, dbeta = du, None
    dc = (q * dq).sum(-1)
    if beta is not None and parts.inverse is not None:
        corrected = parts.inverse.mT @ du  # of beta v - beta e^c (k S)
        mixing = (corrected @ parts.u.mT).mul_(parts.decay).tril_(-1).neg_()  # of strict_lower(k k^T), over beta
        read = torch.baddbmm(
            (corrected @ parts.states.mT).mul_(parts.start), mixing, k, beta=-1
        )  # k as it reads, over beta
        along = (k * read).sum(-1, keepdim=True)
        dbeta = (corrected * v).sum(-1, keepdim=True) + along
        _add_product(dk, mixing.mul_(beta).mT, k)
        dc = dc + (along * beta).squeeze(-1)
        dc = dc - (k * dk).sum(-1)
        dk.addcmul_(read, beta)
        dv = corrected * beta
    else:
        dc = dc - (k * dk).sum(-1)
    dtotal = (k * through_end).sum((-1, -2)) + parts.total[:, 0, 0] * (dstates * parts.states).sum((-1, -2))
    dc[:, -1] += dtotal
    dg = dc.flip(-1).cumsum(-1).flip(-1)
    return _Grads(dq, dk, dv, dbeta, dg), dstate


def _scan_back(inputs: _Inputs, parts: _Parts, do: Tensor, dfinal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence in reverse: gradients of u (M, C, V), of the state after each chunk (M, K, V), of the first."""
    rows = dfinal.shape[0]
    chunks = do.shape[0] // rows
    du = parts.scores.mT @ do
    keys = inputs.k * parts.end
    direct = (inputs.q * parts.start).mT @ do  # (M, K, V)
    dstates = torch.empty_like(direct)
    dstate = dfinal.clone()
    for n in reversed(range(chunks)):
        at = slice(n * rows, (n + 1) * rows)
        dstates[at].copy_(dstate)
        _add_product(du[at], keys[at], dstate)
        dstate.mul_(parts.total[at]).add_(direct[at])
        if parts.reader is not None:
            _add_product(dstate, parts.reader[at].mT, du[at], factor=-1)
    return du, dstates, dstate


def _unit_lower_inverse(lower: Tensor) -> Tensor:
    """(I + lower)^-1 for strictly lower triangular matrices (M, C, C), C a power of two.

    Block recursion: the inverse of [[P, 0], [Q, R]] is [[P', 0], [-R' Q P', R']].
    """
    count, size = lower.shape[0], lower.shape[-1]
    inverse = torch.eye(size, dtype=lower.dtype, device=lower.device).repeat(count, 1, 1)
    half = 1
    while half < size:
        blocks = _diagonal_blocks(inverse, 2 * half)
        corner = _diagonal_blocks(lower, 2 * half)[:, :, half:, :half]
        if half > 1:
            corner = blocks[:, :, half:, half:] @ corner @ blocks[:, :, :half, :half]
        blocks[:, :, half:, :half] = -corner
        half *= 2
    return inverse


def _diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """A view (M, C / size, size, size) of the blocks on the diagonal of (M, C, C)."""
    grid = matrix.unflatten(2, (-1, size)).unflatten(1, (-1, size))  # (M, n, size, n, size)
    return grid.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def _add_product(total: Tensor, left: Tensor, right: Tensor, factor: int = 1) -> Tensor:
    """total += factor * left @ right, in place; FlopCounterMode does not count it when spelled `baddbmm_`."""
    return torch.baddbmm(total, left, right, alpha=factor, out=total)


def _exp(log: Tensor) -> Tensor:
    """exp in place, exactly zero far below one."""
    return F.threshold(log, _LOG_ZERO, float("-inf"), inplace=True).exp_()


def _upper(c: Tensor) -> Tensor:
    return torch.ones(c.shape[-1], c.shape[-1], dtype=torch.bool, device=c.device).triu_(1)


def _groups(k: Tensor, v: Tensor) -> list[slice]:
    """Token ranges of the groups of chunks; the last may reach beyond the last token."""
    chunks = -(-v.shape[1] // CHUNK)
    numbers = v.shape[0] * v.shape[2] * CHUNK * max(k.shape[-1], v.shape[-1])
    size = min(max(_GROUP_NUMBERS // numbers, 1), chunks)
    return [slice(n * CHUNK, min(n + size, chunks) * CHUNK) for n in range(0, chunks, size)]


def _inputs(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, scale: float, group: slice, dtype: torch.dtype
) -> _Inputs:
    heads = v.shape[2]
    # float64 where there is any: differences of long sums keep their digits beside a strong decay.
    exact = torch.float32 if g.device.type == "mps" else torch.float64
    log_decay = _chunks(g, group, heads, exact).clamp_(min=2 * _LOG_ZERO)
    return _Inputs(
        _chunks(q, group, heads, dtype).mul_(scale),
        _chunks(k, group, heads, dtype),
        _chunks(v, group, heads, dtype),
        None if beta is None else _chunks(beta, group, heads, dtype)[..., None],
        log_decay.cumsum(-1),
    )


def _chunks(x: Tensor, group: slice, heads: int, dtype: torch.dtype) -> Tensor:
    """Tokens `group` of x (B, T, H', ...) as new matrices (n * B * H, C, ...): zeros beyond T, heads repeated."""
    x = x[:, group]
    missing = group.stop - group.start - x.shape[1]
    if missing:
        x = torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], dim=1)
    x = x.unflatten(1, (-1, CHUNK)).unflatten(3, (-1, 1))  # (B, n, C, H', 1, ...)
    repeats = heads // x.shape[3]
    x = x.expand(*x.shape[:4], repeats, *x.shape[5:]).permute(1, 0, 3, 4, 2, *range(5, x.ndim))
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    return out.copy_(x).flatten(0, 3)


def _write(out: Tensor, matrices: Tensor, group: slice) -> None:
    """The inverse of `_chunks`, into out (B, T rounded up, H', ...); repeated heads are summed."""
    target = out[:, group].unflatten(1, (-1, CHUNK))  # (B, n, C, H', ...)
    batch, chunks, _, heads = target.shape[:4]
    source = matrices.view(chunks, batch, heads, -1, *matrices.shape[1:])  # (n, B, H', r, C, ...)
    source = source.sum(3) if source.shape[3] > 1 else source.squeeze(3)
    target.copy_(source.permute(1, 0, 3, 2, *range(4, source.ndim)))


def _padded_like(x: Tensor) -> Tensor:
    """Uninitialised, as x (B, T, ...), with T rounded up to whole chunks; `_write` fills all of it."""
    tokens = -(-x.shape[1] // CHUNK) * CHUNK
    return torch.empty(x.shape[0], tokens, *x.shape[2:], dtype=x.dtype, device=x.device)
