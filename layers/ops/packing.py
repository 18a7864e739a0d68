"""Segments packed into one row: to padded batches and back, and operators applied segment by segment."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SegmentOp = Callable[[list[Tensor], Tensor | None, Tensor], tuple[Tensor, Tensor | None]]
"""(tokens, each (n, L, ...); states (n, ...) or None; lengths (n,)) -> (outputs (n, L, ...), final states or None)."""


class _Bucket(NamedTuple):
    rows: Tensor  # (n,) which segments
    lengths: Tensor  # (n,)
    source: Tensor  # (n, L) where their tokens stand in the packed row, 0 at padding
    mask: Tensor  # (n, L) True at tokens
    flat: Tensor  # (tokens,) where the tokens stand in the flattened (n * L) batch


def pad_packed(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Segments of a packed row x (1, T, ...) as a batch (N, Tmax, ...), zeros on the right.

    cu_seqlens (N + 1,) integers: boundaries 0, ..., T. Differentiable. Reads cu_seqlens on the host.
    """
    lengths = cu_seqlens.diff().tolist()
    return _gather(x, _bucket(cu_seqlens.tolist(), list(range(len(lengths))), x.device))


def unpad_packed(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The inverse of `pad_packed`: x (N, Tmax, ...) to the packed row (1, T, ...)."""
    lengths = cu_seqlens.diff().tolist()
    bucket = _bucket(cu_seqlens.tolist(), list(range(len(lengths))), x.device)
    return x.flatten(0, 1)[bucket.flat][None]


def map_segments(
    op: SegmentOp, tokens: list[Tensor], states: Tensor | None, cu_seqlens: Tensor, unit: int = 1
) -> tuple[Tensor, Tensor | None]:
    """Apply `op` to every segment of packed rows: tokens, each (1, T, ...), states (N, ...) -> as `op`, packed again.

    Segments are padded on the right with zeros: an operator sees zero tokens after a segment's end and must leave the
    state unchanged by them. unit: tokens that the operator works on at once. Batches are of similar length, counted in
    whole units, so that at most half of the units of a batch are padding.
    """
    bounds = cu_seqlens.tolist()
    device = tokens[0].device
    by_size: dict[int, list[int]] = {}
    for row, (start, stop) in enumerate(itertools.pairwise(bounds)):
        by_size.setdefault((max(stop - start - 1, 0) // unit).bit_length(), []).append(row)
    buckets = [_bucket(bounds, rows, device) for rows in by_size.values()]
    outputs, finals = [], []
    for bucket in buckets:
        own = None if states is None else states[bucket.rows]
        output, final = op([_gather(x, bucket) for x in tokens], own, bucket.lengths)
        outputs.append(output.flatten(0, 1)[bucket.flat])
        finals.append(final)
    order = torch.cat([bucket.source[bucket.mask] for bucket in buckets]).argsort()
    packed = torch.cat(outputs)[order][None]
    known = [final for final in finals if final is not None]
    return packed, torch.cat(known)[torch.cat([bucket.rows for bucket in buckets]).argsort()] if known else None


def _bucket(bounds: list[int], rows: list[int], device: torch.device) -> _Bucket:
    # Built on the host: indexing by a mask on the device would have to wait for it.
    starts = torch.tensor([bounds[row] for row in rows])
    lengths = torch.tensor([bounds[row + 1] - bounds[row] for row in rows])
    offset = torch.arange(max(int(lengths.max()), 1))
    mask = offset < lengths[:, None]
    index = torch.where(mask, starts[:, None] + offset, 0)
    flat = mask.flatten().nonzero().squeeze(-1)
    return _Bucket(torch.tensor(rows, device=device), *(t.to(device) for t in (lengths, index, mask, flat)))


def _gather(x: Tensor, bucket: _Bucket) -> Tensor:
    mask = bucket.mask.reshape(*bucket.mask.shape, *(1,) * (x.ndim - 2))
    return torch.where(mask, x[0][bucket.source], torch.zeros((), dtype=x.dtype, device=x.device))
