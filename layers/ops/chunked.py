"""The chunk-parallel form of the decayed linear recurrences (gated delta rule, SSD), forward and differentiable.

Notation, within a chunk of C tokens that starts at state S (K, V), c = cumulated log decay, D[i, j] = e^(c_i - c_j),
s = scale:

    u = X (beta v - beta e^c (k S))        X = (I + strict_lower(beta k k^T) D)^-1, or u = beta v without the delta rule
    o = s e^c (q S) + s lower(q k^T) D u   S' = e^(c_C) S + (e^(c_C - c) k)^T u

(Yang, Kautz, Hatamizadeh 2024, arXiv 2412.06464, section 3; Dao, Gu 2024, arXiv 2405.21060, section 6.) All that does
not depend on S is computed for a group of chunks at once. The backward pass, in `chunked_backward`, keeps the state at
the start of every group and recomputes the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridvl.layers.ops.checks import full_precision, internal_dtype
from hybridvl.layers.ops.chunk_layout import CHUNK, Chunks, Tokens, Workspace, cut
from hybridvl.layers.ops.chunked_backward import Gradients, group_gradients
from hybridvl.layers.ops.chunked_groups import LOG_ZERO, Group, Solution, prepare, sequence


def chunked_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float,
    delta: bool,
    unit_eps: float | None = None,
    skip: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o and the final state of the delta rule, or without delta of S = e^g S + k (beta v)^T; o = scale q S.

    q, k: (B, T, Hk, K), head h of v uses head h // (H / Hk). v: (B, T, H, V). g, beta: (B, T, H). state: (B, H, K, V).
    skip: (H,), skip v is added to o; None for none.
    unit_eps: q and k become x / sqrt(sum x^2 + unit_eps) first; None leaves them as they are.
    Returns o (B, T, H, V) in v's dtype and the final state in float32 (float64 if any input is). Differentiable once.
    """
    if not v.numel():  # no rows or no tokens
        return torch.zeros_like(v), state.to(internal_dtype(q, k, v, g, beta, state))
    arguments = (q, k, v, g, beta, state, skip, scale, delta, unit_eps)
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
        o, final = _Recurrence.apply(*arguments)
        return o, final
    o, final, _ = _forward(Tokens(q, k, v, g, beta, skip, scale, delta, unit_eps), state, keep=False)
    return o, final


def chunked_recurrence_flops(rows: int, tokens: int, key_dim: int, value_dim: int, delta: bool) -> int:
    """Matrix-product FLOPs (2 per multiply-add) of a forward pass over rows = B * H sequences of T tokens."""
    square = CHUNK * CHUNK * (key_dim + value_dim)  # multiply-adds of the scores, and of scores times u
    through_state = 2 * CHUNK * key_dim * value_dim
    if delta:
        square += CHUNK * CHUNK * (key_dim + value_dim)  # overlap, u
        through_state += CHUNK * key_dim * value_dim
        half = 2
        while half < CHUNK:
            square += CHUNK * half * half
            half *= 2
    return 2 * rows * -(-tokens // CHUNK) * (square + through_state)


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        state: Tensor,
        skip: Tensor | None,
        scale: float,
        delta: bool,
        unit_eps: float | None,
    ) -> tuple[Tensor, Tensor]:
        o, final, kept = _forward(Tokens(q, k, v, g, beta, skip, scale, delta, unit_eps), state, keep=True)
        ctx.save_for_backward(q, k, v, g, beta, skip, state, *kept)
        ctx.options = scale, delta, unit_eps
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, beta, skip, state, starts, *solved = ctx.saved_tensors
        tokens = Tokens(q, k, v, g, beta, skip, *ctx.options)
        work = Workspace(starts.dtype, v.device)
        solution = Solution(*solved) if solved else None
        dskip = None if skip is None else torch.zeros_like(skip, dtype=starts.dtype)
        dq, dk, dv, dg, dbeta = (torch.empty_like(x) for x in (q, k, v, g, beta))
        gradients = Gradients(Chunks(dq), Chunks(dk), Chunks(dv), Chunks(dg), Chunks(dbeta), dskip)
        with full_precision(v.device):
            everything, dos = sequence(tokens, work.dtype), Chunks(do)
            dstate = dfinal.flatten(0, 1).to(work.dtype)
            for n, span in reversed(list(enumerate(cut(tokens)))):
                part = None if solution is None else solution.of(span.matrices(dstate.shape[0]))
                group = prepare(tokens, everything, span, work, part, solved=True)
                dstate = group_gradients(group, starts[n], dos, dstate, gradients)
            # A clipped decay is constant: only rounding noise is left of its gradient.
            dg.masked_fill_(g < LOG_ZERO, 0.0)
        dskip = None if skip is None or dskip is None else dskip.to(skip.dtype)
        return dq, dk, dv, dg, dbeta, dstate.view(state.shape).to(state.dtype, copy=True), dskip, None, None, None


def _forward(tokens: Tokens, state: Tensor, keep: bool) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """o, the final state (B, H, K, V), and, if asked to keep it, what the backward pass does not compute again.

    Kept are the states (groups, B * H, K, V) before the groups, and of the delta rule the solution of all chunks.
    """
    batch, _, heads, width = tokens.v.shape
    rows, spans = batch * heads, cut(tokens)
    kept: tuple[Tensor, ...] = ()
    solution = None
    work = Workspace(internal_dtype(tokens.q, tokens.k, tokens.v, tokens.g, tokens.beta, state), tokens.v.device)
    o = torch.empty_like(tokens.v, memory_format=torch.contiguous_format)
    current = state.flatten(0, 1).to(work.dtype)
    if keep:
        size = spans[-1].matrices(rows).stop
        if tokens.delta:
            solution = Solution(work.tensor("kept X", size, CHUNK, CHUNK), work.tensor("kept u", size, CHUNK, width))
        kept = (work.tensor("starts", len(spans), *current.shape), *(solution or ()))
    with full_precision(tokens.v.device):
        everything, outputs = sequence(tokens, work.dtype), Chunks(o)
        for n, span in enumerate(spans):
            if keep:
                kept[0][n].copy_(current)
            part = None if solution is None else solution.of(span.matrices(rows))
            current = _forward_group(prepare(tokens, everything, span, work, part, solved=False), current, outputs)
    return o, current.view(state.shape).clone(), kept


def _forward_group(group: Group, state: Tensor, o: Chunks) -> Tensor:
    """Write a group's outputs into o; the state (B * H, K, V) after it, in one of two buffers."""
    work, chunks, width = group.work, group.span.chunks, group.v.shape[2]
    through = work.tensor("through", *group.readers.shape[:2], width)
    turns = [work.tensor(f"state {n}", *state.shape) for n in range(2)]
    if state is turns[0]:
        turns.reverse()
    for read, readers, step in zip(through.chunk(chunks), group.readers.chunk(chunks), group.steps(), strict=True):
        torch.bmm(readers, state, out=read)
        state = step.take(state, read[:, CHUNK:], out=turns[0])
        turns.reverse()
    local = torch.bmm(group.scores, group.u, out=work.tensor("local", *group.u.shape))
    local.add_(through[:, :CHUNK])
    o.store(local if group.skip is None else local.addcmul_(group.v, group.skip), group.span)
    return state
