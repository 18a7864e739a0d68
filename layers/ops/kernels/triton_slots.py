"""New keys and values into the slots of a cache in one launch, in Triton. Not yet run on a GPU.

Lengths and counts are read on the device, the grid follows from shapes alone: a CUDA graph can hold it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hybridvl.layers.errors import ConfigError
from hybridvl.layers.ops.kernels.triton_common import on_device, power_of_two


def store_in_slots(k: Tensor, v: Tensor, slots_k: Tensor, slots_v: Tensor, length: Tensor, counts: Tensor) -> None:
    """See `layers.ops.slots.store_in_slots`; the slots' last axis must be dense."""
    for name, slot in (("slots_k", slots_k), ("slots_v", slots_v)):
        if slot.stride(-1) != 1 and slot.shape[-1] > 1:
            raise ConfigError(f"store_in_slots: {name} has strides {slot.stride()}, expected a last one of 1")
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    batch, tokens, heads, key_dim = k.shape
    slots = slots_k.shape[1]
    newest = min(tokens, slots)  # no slot twice in a row
    if not (newest and batch):
        return
    tile = power_of_two(heads), power_of_two(max(key_dim, v.shape[3]))
    with on_device(k):
        _store[(newest, batch)](
            k, v, slots_k, slots_v, length.contiguous(), counts.contiguous(), newest, slots, heads,
            *k.stride()[:3], *v.stride()[:3], *slots_k.stride()[:3], *slots_v.stride()[:3],
            key_dim, v.shape[3], *tile, num_warps=1 if tile[0] * tile[1] <= 1024 else 4,
        )  # fmt: skip


@triton.jit
def _store(
    k, v, slots_k, slots_v, length, counts, newest, slots, heads,
    k_row, k_token, k_head, v_row, v_token, v_head,
    slots_k_row, slots_k_slot, slots_k_head, slots_v_row, slots_v_slot, slots_v_head,
    K: tl.constexpr, V: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One new token of a row: it is left out if it is padding."""
    row = tl.program_id(1).to(tl.int64)
    count = tl.load(counts + row)
    token = tl.maximum(count - newest, 0) + tl.program_id(0)
    slot = (tl.load(length + row) + token) % slots
    head, column = tl.arange(0, HEADS).to(tl.int64)[:, None], tl.arange(0, COLUMNS)[None, :]
    real = (head < heads) & (token < count)
    key = tl.load(k + row * k_row + token * k_token + head * k_head + column, mask=real & (column < K), other=0.0)
    value = tl.load(v + row * v_row + token * v_token + head * v_head + column, mask=real & (column < V), other=0.0)
    key_at = slots_k + row * slots_k_row + slot * slots_k_slot + head * slots_k_head + column
    value_at = slots_v + row * slots_v_row + slot * slots_v_slot + head * slots_v_head + column
    tl.store(key_at, key.to(slots_k.dtype.element_ty), mask=real & (column < K))
    tl.store(value_at, value.to(slots_v.dtype.element_ty), mask=real & (column < V))
