"""Attention of new tokens to a cache in Triton, split over the keys where queries are few. Not yet run on a GPU.

A program takes a block of queries of the heads that share a key head, and a part of the cache. Lengths are read on the
device, grids and splits follow from shapes alone: a CUDA graph can hold it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridvl.layers.ops.kernels.triton_common import INTERPRETED, on_device, power_of_two, processors

_MOST_SPLITS = 128


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, length: Tensor, scale: float | None
) -> Tensor:
    """See `layers.ops.ring_attention.ring_attention`; forward only."""
    return _attend(q, k.contiguous(), v.contiguous(), ring_k, ring_v, length, scale)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, length: Tensor, scale: float | None) -> Tensor:
    """See `layers.ops.ring_attention.cached_attention`; forward only."""
    return _attend(q, None, None, k, v, length, scale)


def _attend(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    slots_k: Tensor,
    slots_v: Tensor,
    length: Tensor,
    scale: float | None,
    splits: int | None = None,
) -> Tensor:
    """New tokens k, v beside a ring of slots, or slots that hold them already (k, v None); splits: None = by shape."""
    q, length = q.contiguous(), length.contiguous()
    # Slots of a longer cache are a view: only the last axis has to be dense.
    slots_k, slots_v = (x if x.stride(-1) == 1 else x.contiguous() for x in (slots_k, slots_v))
    batch, tokens, heads, key_dim = q.shape
    slots, kv_heads, value_dim = slots_v.shape[1:]
    y = q.new_empty(batch, tokens, heads, value_dim)
    if not y.numel():
        return y
    group = heads // kv_heads
    queries = min(power_of_two(tokens * group, 16), 64)
    keys = 64 if max(key_dim, value_dim) <= 128 and q.dtype != torch.float32 else 32
    grid = triton.cdiv(tokens * group, queries), batch * kv_heads
    splits = splits or _splits(grid[0] * grid[1], triton.cdiv(slots, keys), processors(q))
    o = y if splits == 1 else torch.empty(splits, *y.shape, dtype=torch.float32, device=q.device)
    logs = torch.empty(splits, batch, tokens, heads, dtype=torch.float32, device=q.device)
    with on_device(q):
        _partial[(grid[0], splits, grid[1])](
            q, k, v, slots_k, slots_v, length, o, logs, key_dim**-0.5 if scale is None else scale, tokens, slots,
            *slots_k.stride()[:3], *slots_v.stride()[:3], k is not None, kv_heads, group, key_dim, value_dim,
            splits, queries, keys, power_of_two(key_dim, 16), power_of_two(value_dim, 16), INTERPRETED,
            num_warps=4, num_stages=2,
        )  # fmt: skip
        if splits > 1:
            rows = batch * tokens * heads
            _combine[(rows,)](o, logs, y, rows, value_dim, splits, power_of_two(splits), power_of_two(value_dim, 16))
    return y


def _splits(programs: int, most: int, multiprocessors: int) -> int:
    """Parts of the cache, so that about two programs a multiprocessor run."""
    return max(min(2 * multiprocessors // programs, most, _MOST_SPLITS), 1)


@triton.jit
def _accumulate(
    query, key_at, value_at, inside, seen, top, total, summed, scale,
    K: tl.constexpr, V: tl.constexpr, KEY_COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Keys (N, K) and values (N, V), rows at the pointers, into the running maximum, sum of weights and values."""
    column, value_column = tl.arange(0, KEY_COLUMNS)[None, :], tl.arange(0, VALUE_COLUMNS)[None, :]
    key = tl.load(key_at + column, mask=inside[:, None] & (column < K), other=0.0).to(query.dtype)
    value = tl.load(value_at + value_column, mask=inside[:, None] & (value_column < V), other=0.0).to(query.dtype)
    if UPCAST:  # the interpreter cannot multiply matrices of bfloat16
        scores = tl.dot(query.to(tl.float32), tl.trans(key).to(tl.float32), input_precision="ieee")
    else:
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
    scores = tl.where(seen, scores * scale, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # where nothing has been seen yet
    weights = tl.exp2(scores - base[:, None])
    fade = tl.exp2(top - base)
    if UPCAST:
        fresh = tl.dot(weights, value.to(tl.float32), input_precision="ieee")
    else:
        fresh = tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    return new_top, total * fade + tl.sum(weights, 1), summed * fade[:, None] + fresh


@triton.jit
def _partial(
    q, k, v, slots_k, slots_v, length, o, logs, scale, tokens, slots, k_row, k_slot, k_head, v_row, v_slot, v_head,
    RING: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    SPLITS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, KEY_COLUMNS: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    block, split = tl.program_id(0), tl.program_id(1)
    row, kv_head = (tl.program_id(2) // KV_HEADS).to(tl.int64), tl.program_id(2) % KV_HEADS
    index = block * QUERIES + tl.arange(0, QUERIES)
    token, head = index // GROUP, kv_head * GROUP + index % GROUP
    real = token < tokens
    column, value_column = tl.arange(0, KEY_COLUMNS)[None, :], tl.arange(0, VALUE_COLUMNS)[None, :]
    at = (row * tokens + token) * (KV_HEADS * GROUP) + head
    query = tl.load(q + at[:, None] * K + column, mask=real[:, None] & (column < K), other=0.0)
    earlier = tl.load(length + row).to(tl.int32)
    first_token = block * QUERIES // GROUP
    end_token = tl.minimum((block * QUERIES + QUERIES - 1) // GROUP + 1, tokens)
    scale *= 1.4426950408889634  # exp2 instead of exp
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    summed = tl.zeros((QUERIES, VALUE_COLUMNS), tl.float32)

    live = tl.minimum(earlier if RING else earlier + end_token, slots)  # slots that a token is in
    if RING and first_token >= slots - 1:
        live = 0  # the window of every query here begins among the new tokens
    keys_of, values_of = slots_k + row * k_row + kv_head * k_head, slots_v + row * v_row + kv_head * v_head
    share = tl.cdiv(tl.cdiv(live, KEYS), SPLITS) * KEYS
    for start in range(split * share, tl.minimum((split + 1) * share, live), KEYS):
        slot = start + tl.arange(0, KEYS)
        inside = slot < live
        at_slot = slot.to(tl.int64)[:, None]
        key_at, value_at = keys_of + at_slot * k_slot, values_of + at_slot * v_slot
        if RING:
            age = (earlier - 1 - slot) % slots + 1  # tokens from the slot's to the first new one
            seen = inside[None, :] & (age[None, :] + token[:, None] < slots)
        else:
            seen = inside[None, :] & (slot[None, :] <= earlier + token[:, None])
        top, total, summed = _accumulate(
            query, key_at, value_at, inside, seen, top, total, summed, scale, K, V, KEY_COLUMNS, VALUE_COLUMNS, UPCAST
        )

    if RING and split == SPLITS - 1:
        oldest = tl.maximum(first_token - slots + 1, 0) // KEYS * KEYS
        for start in range(oldest, end_token, KEYS):
            new = start + tl.arange(0, KEYS)
            inside = new < tokens
            new_at = ((row * tokens + new) * KV_HEADS + kv_head)[:, None]
            seen = (new[None, :] <= token[:, None]) & (token[:, None] - new[None, :] < slots)
            key_at, value_at = k + new_at * K, v + new_at * V
            top, total, summed = _accumulate(
                query, key_at, value_at, inside, seen, top, total, summed, scale,
                K, V, KEY_COLUMNS, VALUE_COLUMNS, UPCAST,
            )  # fmt: skip

    divisor = tl.where(total == 0.0, 1.0, total)
    if SPLITS > 1:
        at += split.to(tl.int64) * (tl.num_programs(2) * GROUP * tokens)  # rows of one split
        tl.store(logs + at, tl.where(total == 0.0, float("-inf"), top + tl.log2(divisor)), mask=real)
    out_mask = real[:, None] & (value_column < V)
    tl.store(o + at[:, None] * V + value_column, (summed / divisor[:, None]).to(o.dtype.element_ty), mask=out_mask)


@triton.jit
def _combine(
    o, logs, y, rows, V: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """The parts of one query, weighted by their sums of weights (logarithms of base 2)."""
    row, part, column = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS), tl.arange(0, COLUMNS)
    log = tl.load(logs + part * rows + row, mask=part < SPLITS, other=float("-inf"))
    top = tl.max(log, 0)
    weight = tl.exp2(log - tl.where(top == float("-inf"), 0.0, top))
    mask = (part < SPLITS)[:, None] & (column < V)[None, :]
    parts = tl.load(o + (part * rows + row)[:, None] * V + column[None, :], mask=mask, other=0.0)
    total = tl.sum(weight, 0)
    result = tl.sum(parts * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(y + row * V + column, result.to(y.dtype.element_ty), mask=column < V)
