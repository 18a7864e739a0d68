"""The backward pass of the chunked recurrences for one group of chunks; formulas and letters as in `chunked`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybridvl.layers.ops.chunk_layout import CHUNK, Chunks, Workspace
from hybridvl.layers.ops.chunked_groups import Group


class Gradients(NamedTuple):
    """Where the gradients of `Tokens` go, each shaped as its input; skip's is added to."""

    q: Chunks
    k: Chunks
    v: Chunks
    g: Chunks
    beta: Chunks
    skip: Tensor | None


def group_gradients(group: Group, start: Tensor, do: Chunks, dstate: Tensor, out: Gradients) -> Tensor:
    """Write a group's gradients into out; return that of the state (B * H, K, V) at its start.

    start: the state there. do: (B, T, H, V) of all outputs. dstate: (B * H, K, V) of the state after the group.
    """
    work, q, k, rows = group.work, group.qk[:, :CHUNK], group.qk[:, CHUNK:], group.readers.shape[1]
    states = _states(group, start)
    errors, du, dstates = _scan_back(group, do, dstate)
    # do and, below it, w: the gradient of beta v - beta e^c (k S). Both take the same way back.
    through = torch.bmm(errors, states[:-1].flatten(0, 1).mT, out=work.tensor("dreaders", *group.readers.shape))
    mixing = torch.bmm(errors, group.u.mT, out=work.tensor("mixing", *group.products.shape))
    # What a token reads of its own knows no decay: left for last, so that dg is no small difference of large numbers.
    own = mixing[:, :CHUNK].diagonal(dim1=1, dim2=2)[..., None] * group.scale
    own_along = group.products[:, :CHUNK].diagonal(dim1=1, dim2=2)[..., None] * own
    mixing[:, :CHUNK].mul_(group.decay).mul_(group.scale).tril_(-1)
    if group.inverse is not None:
        mixing[:, CHUNK:].mul_(group.decay).tril_(-1).neg_()
    dreads = torch.bmm(mixing, k, out=work.tensor("dreads", *group.readers.shape))
    # pairs[i, j]: the gradient of c_i - c_j, by what i reads of what j wrote; reads[i]: of c_i, by what it reads of S.
    pairs = torch.mul(mixing, group.products, out=group.products)
    reads = _dots(q, through[:, :CHUNK], work).mul_(group.start).mul_(group.scale)
    dq = dreads[:, :CHUNK].addcmul_(through[:, :CHUNK], group.start, value=group.scale)
    dq_along = pairs[:, :CHUNK].sum(-1, keepdim=True) + reads
    if group.inverse is None:
        dbeta, dv = _dots(du, group.v, work), du
    else:
        dv, dread = errors[:, CHUNK:], dreads[:, CHUNK:].addcmul_(through[:, CHUNK:], group.start, value=-1)
        reads_over_beta = _dots(k, through[:, CHUNK:], work).mul_(group.start).neg_()
        dread_along = pairs[:, CHUNK:].sum(-1, keepdim=True) + reads_over_beta  # over beta
        dbeta = _dots(dv, group.v, work) + dread_along
        pairs = pairs[:, :CHUNK].add_(pairs[:, CHUNK:].mul_(group.beta))
        reads = reads + reads_over_beta * group.beta
        mixing[:, CHUNK:].mul_(group.beta)
    dv.mul_(group.beta)
    if group.skip is not None and out.skip is not None:
        given = errors[:, :CHUNK]  # do
        dv.addcmul_(given, group.skip)
        out.skip.add_(_dots(given, group.v, work).view(-1, out.skip.shape[0], CHUNK).sum((0, 2)))
    # k as it is written: for later tokens of the chunk, and into the state.
    dk = torch.bmm(mixing.mT, group.qk[:, :rows], out=work.tensor("written", *group.keys.shape))
    dkeys = torch.bmm(group.u, dstates[1:].flatten(0, 1).mT, out=work.tensor("dkeys", *group.keys.shape))
    dkeys_along = _dots(k, dkeys, work).mul_(group.end)
    dg = _decay_gradient(pairs, reads, dkeys_along)
    dg += torch.mul(states[:-1], dstates[1:], out=states[:-1]).flatten(0, 1).sum((-1, -2), keepdim=True) * group.total
    dq.addcmul_(k, own)
    dk.addcmul_(dkeys, group.end).addcmul_(q, own)
    dk_along = pairs.sum(1)[..., None] + dkeys_along
    if group.inverse is not None:
        dk.addcmul_(dread, group.beta)
        dk_along.addcmul_(dread_along, group.beta)
    if group.norms is not None:
        dq.addcmul_(q, dq_along + own_along, value=-1).mul_(group.norms[:, :CHUNK])
        dk.addcmul_(k, dk_along + own_along, value=-1).mul_(group.norms[:, CHUNK:])
    gradients = (dq, dk, dv, dg.squeeze(-1), dbeta.squeeze(-1))
    for gradient, target in zip(gradients, (out.q, out.k, out.v, out.g, out.beta), strict=True):
        target.store(gradient, group.span)
    return dstates[0]


def _decay_gradient(pairs: Tensor, reads: Tensor, writes: Tensor) -> Tensor:
    """(M, C, 1): the gradient of each token's log decay, but for that of the state that passes through the chunk.

    It is the sum over all that crosses the token: pairs (M, C, C) of later and earlier tokens of the chunk, reads
    (M, C, 1) of the state before it by later tokens, writes (M, C, 1) of earlier tokens to the state after it.
    """
    dg = reads.flip(1).cumsum(1).flip(1)
    crossing = pairs.cumsum(-1).tril_(-1).sum(1)[..., None] + writes.cumsum(1)
    dg[:, 1:] += crossing[:, :-1]
    return dg


def _states(group: Group, start: Tensor) -> Tensor:
    """The states (n + 1, B * H, K, V) around the chunks."""
    states = group.work.tensor("states", group.span.chunks + 1, *start.shape)
    states[0].copy_(start)
    torch.bmm(group.keys.mT, group.u, out=states[1:].flatten(0, 1))
    for before, after, total in zip(states, states[1:], group.total.chunk(group.span.chunks), strict=False):
        after.addcmul_(before, total)
    return states


def _scan_back(group: Group, do: Chunks, dstate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence in reverse.

    Returns errors (M, 2C, V), do above w = X^T du, or (M, C, V) do alone without the delta rule; du (M, C, V);
    the gradients (n + 1, B * H, K, V) of the states around the chunks.
    """
    work, chunks, delta = group.work, group.span.chunks, group.inverse is not None
    errors = work.tensor("errors", group.v.shape[0], (1 + delta) * CHUNK, group.v.shape[2])
    do.load(group.span, errors[:, :CHUNK])
    du = torch.bmm(group.scores.mT, errors[:, :CHUNK], out=work.tensor("du", *group.v.shape))
    read = work.tensor("read", dstate.shape[0], CHUNK, group.v.shape[2])
    dstates = work.tensor("dstates", chunks + 1, *dstate.shape)
    dstates[-1].copy_(dstate)
    *befores, after = dstates.unbind()
    inverses = [None] * chunks if group.inverse is None else group.inverse.mT.chunk(chunks)
    parts = (x.chunk(chunks) for x in (group.keys, du, errors, group.readers.mT, group.total))
    steps = list(zip(befores, inverses, *parts, strict=True))
    for before, inverse, keys, grown, error, readers, total in reversed(steps):
        grown.add_(torch.bmm(keys, after, out=read))
        if inverse is not None:
            error[:, CHUNK:].copy_(torch.bmm(inverse, grown, out=read))
        after = torch.bmm(readers, error, out=before).addcmul_(after, total)
    return errors, du, dstates


def _dots(left: Tensor, right: Tensor, work: Workspace) -> Tensor:
    """Scalar products of rows, (M, C, D) and (M, C, D) to (M, C, 1)."""
    return torch.mul(left, right, out=work.tensor("product", *left.shape)).sum(-1, keepdim=True)
