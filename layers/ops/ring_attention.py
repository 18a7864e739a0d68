"""Attention of new tokens to a cache: a ring of the last W tokens, or slots in the order of the tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridvl.layers.errors import ConfigError
from hybridvl.layers.ops.attention import attention, attention_flops
from hybridvl.layers.ops.backend import resolve_backend
from hybridvl.layers.ops.checks import check_floating, check_shape, readable_on_host


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    length: Tensor,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sliding-window attention of a chunk of T new tokens that follow `length` earlier ones, of which a ring of W slots
    holds the last W: the token at position p lies in slot p mod W.

    q: (B, T, H, K). k: (B, T, Hkv, K), v: (B, T, Hkv, V), of the new tokens, H a multiple of Hkv. ring_k, ring_v:
    (B, W, Hkv, K or V), as they are before the chunk is written into them. length: (B,) int64, tokens each row has
    seen before. The query of new token t stands at position length + t and sees positions length + t - W + 1 to
    length + t: slots not yet written are seen by none. Chunks may be longer than W. Rows padded on the right need no
    mask: no real token sees what follows it. scale: K^-0.5 if None.
    Returns (B, T, H, V) in q's dtype. O(T W) time, O(W) scratch. Raises ConfigError naming a misshapen argument.
    """
    _check("ring_attention", q, ring_k, ring_v, length)
    batch, tokens, _, dim = q.shape
    kv_heads = ring_k.shape[2]
    check_shape("ring_attention", "k", k, "(B, T, Hkv, K)", (batch, tokens, kv_heads, dim))
    check_shape("ring_attention", "v", v, "(B, T, Hkv, V)", (batch, tokens, kv_heads, ring_v.shape[3]))
    chosen = _resolve(backend, q, k, v, ring_k, ring_v)
    if chosen == "triton":
        from hybridvl.layers.ops.kernels import triton_ring_attention

        return triton_ring_attention.ring_attention(q, k, v, ring_k, ring_v, length, scale)
    ring_k, ring_v = ring_k.to(k.dtype), ring_v.to(v.dtype)
    if chosen == "reference":
        return _ring_reference(q, k, v, ring_k, ring_v, length, scale)
    return _ring_torch(q, k, v, ring_k, ring_v, length, scale)


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, length: Tensor, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """Attention of T new tokens to slots that hold them already: query t of a row sees the slots 0 to length + t.

    q: (B, T, H, K). k: (B, S, Hkv, K), v: (B, S, Hkv, V). length: (B,) int64, tokens before the new ones. A length
    beyond S - 1 sees all slots: so a single token (T = 1) is served from a ring, too, once written into it. What the
    slots of no token hold is read, if at all, with weight zero: it must be finite. scale: K^-0.5 if None.
    Returns (B, T, H, V) in q's dtype. A single token reads the slots in use once, where they are. Raises ConfigError
    naming a misshapen argument.
    """
    _check("cached_attention", q, k, v, length)
    chosen = _resolve(backend, q, k, v)
    if chosen == "triton":
        from hybridvl.layers.ops.kernels import triton_ring_attention

        return triton_ring_attention.cached_attention(q, k, v, length, scale)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if chosen == "reference":
        return attention(q, k, v, mask=_seen(q, k, length), scale=factor, backend="reference")
    # A cache in a wider dtype than the queries is not converted at every step: the queries are.
    wide = torch.promote_types(q.dtype, k.dtype)
    return _cached_torch(q.to(wide), k.to(wide), v.to(wide), length, factor).to(q.dtype)


def _resolve(backend: str, q: Tensor, k: Tensor, v: Tensor, *cache: Tensor) -> str:
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *cache))
    return resolve_backend(
        "ring_attention", backend, q.device, q.dtype, q.shape[3], v.shape[3], q.shape[1], grad, windowed=bool(cache)
    )


def _cached_torch(q: Tensor, k: Tensor, v: Tensor, length: Tensor, scale: float) -> Tensor:
    tokens = q.shape[1]
    if readable_on_host(length) and q.numel():
        starts = length.tolist()
        if len(set(starts)) == 1:
            return _after(q, k, v, starts[0], scale)
        if tokens > 1:
            rows = [slice(row, row + 1) for row in range(len(starts))]
            return torch.cat([_after(q[r], k[r], v[r], start, scale) for r, start in zip(rows, starts, strict=True)])
        used = min(max(starts) + 1, k.shape[1])
        k, v = k[:, :used], v[:, :used]
    if tokens == 1:
        return _all_slots(q, k, v, scale, _seen(q, k, length))
    return attention(q, k, v, mask=_seen(q, k, length), scale=scale, backend="torch")


def _seen(q: Tensor, k: Tensor, length: Tensor) -> Tensor:
    """(B, T, S) bool: the slots that each query sees."""
    asked = length[:, None] + torch.arange(q.shape[1], device=q.device)  # (B, T)
    return torch.arange(k.shape[1], device=q.device) <= asked[..., None]


def _after(q: Tensor, k: Tensor, v: Tensor, start: int, scale: float) -> Tensor:
    """Queries at positions start, start + 1, ... of every row; those at the last slot and beyond it see all slots."""
    tokens, slots = q.shape[1], k.shape[1]
    within = min(max(slots - start, 0), tokens)
    if within == 1 == tokens:
        return _all_slots(q, k[:, : start + 1], v[:, : start + 1], scale)
    if within == 0:
        return _all_slots(q, k, v, scale)
    end = start + within
    near = attention(q[:, :within], k[:, :end], v[:, :end], scale=scale, backend="torch")
    if within == tokens:
        return near
    return torch.cat((near, _all_slots(q[:, within:], k, v, scale)), dim=1)


def _all_slots(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor | None = None) -> Tensor:
    """Queries that see all slots, or those of a mask (B, 1, S). The queries of the heads that share a key head are rows
    of one product: SDPA, told of grouped heads, would copy the cache once for each."""
    kv_heads = k.shape[2]
    rows = q.unflatten(2, (kv_heads, -1)).transpose(1, 2)  # (B, Hkv, T, G, K)
    mask = None if seen is None else seen[:, None]
    out = F.scaled_dot_product_attention(
        rows.flatten(2, 3), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale
    )
    return out.unflatten(2, rows.shape[2:4]).transpose(1, 2).flatten(2, 3)


def ring_attention_flops(
    rows: int, tokens: int, context: int, heads: int, key_dim: int, value_dim: int, window: int
) -> int:
    """As `attention_flops`, of a chunk of `tokens` after `context` earlier tokens in every row."""
    earlier, first = min(context, window - 1), _first(tokens, window)
    sizes = (rows, heads, key_dim, value_dim)
    return _flops(first, earlier + first, window, *sizes) + _flops(tokens - first, tokens, window, *sizes)


def _flops(queries: int, keys: int, window: int, rows: int, heads: int, key_dim: int, value_dim: int) -> int:
    return attention_flops(rows, queries, keys, heads, key_dim, value_dim, window) if queries else 0


def _ring_reference(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, length: Tensor, scale: float | None
) -> Tensor:
    """The definition with a dense mask over the ring and the new tokens."""
    window = ring_k.shape[1]
    asked = length[:, None] + torch.arange(q.shape[1], device=q.device)  # (B, T) positions
    last = length[:, None] - 1
    held = last - (last - torch.arange(window, device=q.device)) % window  # (B, W) positions, negative where empty
    held = torch.cat((held, asked), dim=1)[:, None]  # (B, 1, W + T)
    seen = (held >= 0) & (held <= asked[..., None]) & (held > asked[..., None] - window)
    return attention(
        q, torch.cat((ring_k, k), 1), torch.cat((ring_v, v), 1), scale=scale, mask=seen, backend="reference"
    )


def _ring_torch(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, length: Tensor, scale: float | None
) -> Tensor:
    """The first queries over the ring's tokens in their order and the new ones; the others see new tokens only."""
    tokens, window = q.shape[1], ring_k.shape[1]
    first = _first(tokens, window)
    earlier_k, earlier_v, real = _in_order(ring_k, ring_v, length)
    if real is not None:
        real = torch.cat((real, real.new_ones(len(real), first)), dim=1)
    keys, values = (
        # A head's keys together in memory, as the ring's are.
        torch.cat([x.transpose(1, 2) for x in parts], dim=2).transpose(1, 2)
        for parts in ((*earlier_k, k[:, :first]), (*earlier_v, v[:, :first]))
    )
    near = attention(q[:, :first], keys, values, window=window, scale=scale, key_padding_mask=real, backend="torch")
    if first == tokens:
        return near
    return torch.cat((near, attention(q[:, first:], k, v, window=window, scale=scale, backend="torch")), dim=1)


def _first(tokens: int, window: int) -> int:
    """New tokens that may see the ring: W - 1, or all when what is left is little."""
    return tokens if tokens <= 2 * window else window - 1


def _in_order(ring_k: Tensor, ring_v: Tensor, length: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """The ring's last W - 1 tokens or fewer, oldest first, in parts; a mask (B, E) of the real ones (None = all)."""
    window = ring_k.shape[1]
    if readable_on_host(length):
        known = set(length.tolist())
        if len(known) == 1:
            total = known.pop()
            end, count = total % window, min(total, window - 1)
            parts = [slice(end - count, end)]
            if count > end:
                parts = [slice(window - (count - end), window), slice(0, end)]
            return [ring_k[:, part] for part in parts], [ring_v[:, part] for part in parts], None
    # By tensors alone, so that a CUDA graph can be captured: token length - W + 1 + e stands at e.
    position = length[:, None] - (window - 1) + torch.arange(window - 1, device=length.device)  # (B, W - 1)
    row = torch.arange(len(length), device=length.device)[:, None]
    slot = position % window
    return [ring_k[row, slot]], [ring_v[row, slot]], position >= 0


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> None:
    check_floating(op, {"q": q, "k": k, "v": v})
    check_shape(op, "q", q, "(B, T, H, K)", (None, None, None, None))
    batch, _, heads, dim = q.shape
    check_shape(op, "the cache of keys", k, "(B, S, Hkv, K)", (batch, None, None, dim))
    slots, kv_heads = k.shape[1:3]
    check_shape(op, "the cache of values", v, "(B, S, Hkv, V)", (batch, slots, kv_heads, None))
    check_shape(op, "length", length, "(B,)", (batch,))
    if slots == 0:
        raise ConfigError(f"{op}: the cache has no slots, expected at least 1")
    if kv_heads == 0 or heads % kv_heads:
        raise ConfigError(f"{op}: q has {heads} heads, expected a multiple of the {kv_heads} heads of the cache")
