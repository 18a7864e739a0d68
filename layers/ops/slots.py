"""New keys and values into the slots of a cache, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridvl.layers.ops.backend import resolve_backend
from hybridvl.layers.ops.checks import check_floating, check_shape


def store_in_slots(
    k: Tensor, v: Tensor, slots_k: Tensor, slots_v: Tensor, length: Tensor, counts: Tensor, backend: str = "auto"
) -> None:
    """Store the first `counts` of T new tokens that follow `length` earlier ones: that at position p in slot p mod S.

    k: (B, T, H, K). v: (B, T, H, V). slots_k: (B, S, H, K), slots_v: (B, S, H, V), written IN PLACE, in a dtype of
    their own. length, counts: (B,) int64. Of more than S tokens only the last S are kept. Nothing is read on the host,
    and nothing in the shapes depends on data. Backends: "reference", "torch", "triton" (CUDA, without gradients).
    Raises ConfigError naming a misshapen argument.
    """
    _check(k, v, slots_k, slots_v, length, counts)
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (k, v, slots_k, slots_v))
    chosen = resolve_backend(
        "store_in_slots", backend, k.device, slots_k.dtype, k.shape[3], v.shape[3], k.shape[1], grad
    )
    if chosen == "triton":
        from hybridvl.layers.ops.kernels import triton_slots

        triton_slots.store_in_slots(k, v, slots_k, slots_v, length, counts)
    elif chosen == "reference":
        _reference(k, v, slots_k, slots_v, length, counts)
    else:
        _torch(k, v, slots_k, slots_v, length, counts)


def _torch(k: Tensor, v: Tensor, slots_k: Tensor, slots_v: Tensor, length: Tensor, counts: Tensor) -> None:
    slots = slots_k.shape[1]
    newest = min(k.shape[1], slots)
    offsets = torch.arange(newest, device=k.device)
    source = (counts[:, None] - newest).clamp(min=0) + offsets  # (B, newest), in the new tokens
    slot = (length[:, None] + source) % slots  # no slot twice in a row, as newest <= S
    stored = (source < counts[:, None])[..., None, None]
    row = torch.arange(k.shape[0], device=k.device)[:, None]
    for buffer, new in ((slots_k, k), (slots_v, v)):
        # Padding writes back what its slot holds: shapes stay independent of the data.
        buffer[row, slot] = torch.where(stored, new[row, source].to(buffer.dtype), buffer[row, slot])


def _reference(k: Tensor, v: Tensor, slots_k: Tensor, slots_v: Tensor, length: Tensor, counts: Tensor) -> None:
    """The definition, token by token."""
    for row, (before, count) in enumerate(zip(length.tolist(), counts.tolist(), strict=True)):
        for token in range(count):
            slot = (before + token) % slots_k.shape[1]
            slots_k[row, slot], slots_v[row, slot] = k[row, token].to(slots_k.dtype), v[row, token].to(slots_v.dtype)


def _check(k: Tensor, v: Tensor, slots_k: Tensor, slots_v: Tensor, length: Tensor, counts: Tensor) -> None:
    op = "store_in_slots"
    check_floating(op, {"k": k, "v": v, "slots_k": slots_k, "slots_v": slots_v})
    check_shape(op, "k", k, "(B, T, H, K)", (None, None, None, None))
    batch, tokens, heads, dim = k.shape
    check_shape(op, "v", v, "(B, T, H, V)", (batch, tokens, heads, None))
    check_shape(op, "slots_k", slots_k, "(B, S, H, K)", (batch, None, heads, dim))
    check_shape(op, "slots_v", slots_v, "(B, S, H, V)", (batch, slots_k.shape[1], heads, v.shape[3]))
    check_shape(op, "length", length, "(B,)", (batch,))
    check_shape(op, "counts", counts, "(B,)", (batch,))
