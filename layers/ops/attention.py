"""Causal attention: full or windowed, padded, packed, or against a cache under an explicit mask."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridvl.layers.errors import ConfigError
from hybridvl.layers.ops.backend import resolve_backend
from hybridvl.layers.ops.banded_attention import banded_attention
from hybridvl.layers.ops.bands import Block, band_blocks
from hybridvl.layers.ops.checks import check_floating, check_segments, check_shape, full_precision, internal_dtype
from hybridvl.layers.ops.packing import map_segments

_MAX_BLOCK = 256
_MIN_BLOCK = 64
_SHORT = 512  # tokens of a packed segment that is rather attended in a band with others than alone


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    backend: str = "auto",
    mask: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T) v over the keys that each query may see.

    q: (B, T, H, K). k: (B, S, Hkv, K), v: (B, S, Hkv, V), H a multiple of Hkv: head h reads head h // (H / Hkv).
    S >= T: the queries stand at the last T of the S positions. A query at position p sees positions p - window + 1 to
    p, or 0 to p when window is None. scale: K^-0.5 if None.
    cu_seqlens: (N + 1,) boundaries of the segments packed into one row (B = 1, S = T): none sees another.
    key_padding_mask: (B, S) bool, True at real keys; others are seen by none.
    mask: (B, T, S) bool, True where a query may see a key, instead of all of this causal structure.
    Returns (B, T, H, V) in q's dtype; a query that sees no key gives zeros. The windowed form takes O(T window) time
    and O(window) scratch. Backends: "reference", "torch", "sdpa", "flex", "flash_attn" (docs/backends.md). Raises
    ConfigError naming a misshapen argument.
    """
    _check(q, k, v, window, cu_seqlens, key_padding_mask, mask)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = resolve_backend(
        "attention",
        backend,
        q.device,
        q.dtype,
        q.shape[3],
        v.shape[3],
        q.shape[1],
        packed=cu_seqlens is not None,
        windowed=window is not None and window < k.shape[1],
        masked=mask is not None or key_padding_mask is not None,
    )
    if chosen not in ("reference", "torch") and q.numel():
        return _foreign(chosen, q, k, v, window, factor, cu_seqlens, key_padding_mask, mask)
    if mask is not None:
        run = _dense if chosen == "reference" else _sdpa
        return run(q, k, v, mask[:, None], factor)
    if cu_seqlens is None:
        causal = _reference if chosen == "reference" else _torch
        return causal(q, k, v, window, factor, key_padding_mask)

    if chosen == "torch":
        return _packed(q, k, v, window, factor, cu_seqlens)

    def segments(tokens: list[Tensor], state: Tensor | None, lengths: Tensor) -> tuple[Tensor, None]:
        # Padding stands on the right, where no real query looks.
        return _reference(tokens[0], tokens[1], tokens[2], window, factor, None), None

    return map_segments(segments, [q, k, v], None, cu_seqlens)[0]


def attention_flops(
    rows: int, queries: int, keys: int, heads: int, key_dim: int, value_dim: int, window: int | None
) -> int:
    """Matrix-product FLOPs (2 per multiply-add) of one causal forward pass of the PyTorch path, masked products
    included, as FlopCounterMode counts them on the meta device."""
    if _is_plain_causal(queries, keys, window):
        pairs = queries * keys
    else:
        blocks = _blocks(queries, keys) if window is None else band_blocks(queries, keys, window)
        pairs = sum((block.stop - block.start) * (block.last - block.first) for block in blocks)
    return 2 * rows * heads * pairs * (key_dim + value_dim)


def _foreign(
    chosen: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    scale: float,
    cu_seqlens: Tensor | None,
    real: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """A kernel family of others; each module is imported when it is chosen."""
    if chosen == "sdpa":
        from hybridvl.layers.ops.kernels import sdpa

        return sdpa.attention(q, k, v, window, scale, cu_seqlens, real, mask)
    if chosen == "flex":
        from hybridvl.layers.ops.kernels import flex

        return flex.attention(q, k, v, window, scale, cu_seqlens)
    from hybridvl.layers.ops.kernels import flash

    return flash.attention(q, k, v, window, scale, cu_seqlens)


def _reference(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, real: Tensor | None) -> Tensor:
    """The definition with a dense (T, S) mask."""
    keys = k.shape[1]
    position = torch.arange(keys - q.shape[1], keys, device=q.device)[:, None]
    key = torch.arange(keys, device=q.device)
    allowed = (key <= position) & (key > position - (window or keys))  # (T, S)
    if real is not None:
        allowed = allowed & real[:, None, None, :]
    return _dense(q, k, v, allowed, scale)


def _dense(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    dtype = internal_dtype(q, k, v)
    heads = q.shape[2]
    query, key, value = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    with full_precision(q.device):
        scores = (query @ key.mT * scale).masked_fill(~allowed, float("-inf"))
        # A query without keys: finite scores first, so that neither value nor gradient is NaN, then zeros.
        empty = ~allowed.any(-1, keepdim=True)
        weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
        return (weights @ value).transpose(1, 2).to(q.dtype)


def _torch(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, real: Tensor | None) -> Tensor:
    """The fused causal form where there is one, else blocks of queries over the slice of keys that they may see."""
    queries, keys = q.shape[1], k.shape[1]
    if not queries:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    if real is None and _is_plain_causal(queries, keys, window):
        return _fused(q, k, v, None, scale, causal=True)
    if real is None and window is None:
        return _after_context(q, k, v, scale)
    return banded_attention(q, k.to(q.dtype), v.to(q.dtype), min(window or keys, keys), scale, real)


def _after_context(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Queries at the last of more keys: every block sees all but its own later keys."""
    blocks = _blocks(q.shape[1], k.shape[1])
    size, keys = blocks[0].stop, k.shape[1]
    # The mask as numbers once, not once a block: the block's own keys stand last.
    bias = torch.zeros(size, keys, dtype=q.dtype, device=q.device)
    bias[:, keys - size :].masked_fill_(torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1), -math.inf)
    outputs = []
    for start, stop, _, last, _ in blocks:
        at = bias[: stop - start, keys - size + (stop - start) - last : keys - size + (stop - start)]
        outputs.append(_fused(q[:, start:stop], k[:, :last], v[:, :last], at, scale))
    return torch.cat(outputs, dim=1)


def _packed(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, cu_seqlens: Tensor) -> Tensor:
    """Short segments side by side in one band; long ones without a window that matters by the fused causal form."""
    bounds = cu_seqlens.tolist()
    longest = max(stop - start for start, stop in itertools.pairwise(bounds))
    k, v = k.to(q.dtype), v.to(q.dtype)
    if longest <= _SHORT or (window is not None and window < longest):
        return banded_attention(q, k, v, max(min(window or longest, longest), 1), scale, None, tuple(bounds))
    outputs = []
    for start, stop in itertools.pairwise(bounds):
        at = slice(start, stop)
        outputs.append(_torch(q[:, at], k[:, at], v[:, at], window, scale, None))
    return torch.cat(outputs, dim=1)


def _is_plain_causal(queries: int, keys: int, window: int | None) -> bool:
    return queries == keys and (window is None or window >= keys)


def _blocks(queries: int, keys: int) -> list[Block]:
    """Blocks of queries over all earlier keys: the more of them, the larger the products."""
    size = min(max(keys, _MIN_BLOCK), _MAX_BLOCK)
    starts = range(0, queries, size)
    return [Block(t, min(t + size, queries), 0, keys - queries + min(t + size, queries)) for t in starts]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """Under a bool mask that broadcasts to (B, H, T, S); queries without keys give zeros, and zero gradients."""
    some = allowed.any(-1, keepdim=True)  # (B, 1, T, 1)
    out = _fused(q, k, v, allowed | ~some, scale)
    return out.masked_fill(~some.transpose(1, 2), 0.0)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool = False) -> Tensor:
    query, key, value = (x.to(q.dtype).transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[2] != k.shape[2]
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2).to(q.dtype)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    cu_seqlens: Tensor | None,
    key_padding_mask: Tensor | None,
    mask: Tensor | None,
) -> None:
    op = "attention"
    check_floating(op, {"q": q, "k": k, "v": v})
    check_shape(op, "q", q, "(B, T, H, K)", (None, None, None, None))
    batch, queries, heads, dim = q.shape
    check_shape(op, "k", k, "(B, S, Hkv, K)", (batch, None, None, dim))
    keys, kv_heads = k.shape[1:3]
    check_shape(op, "v", v, "(B, S, Hkv, V)", (batch, keys, kv_heads, None))
    if kv_heads == 0 or heads % kv_heads:
        raise ConfigError(f"{op}: q has {heads} heads, expected a multiple of the {kv_heads} heads of k and v")
    if window is not None and window < 1:
        raise ConfigError(f"{op}: window is {window}, expected None or at least 1")
    if mask is not None:
        if window is not None or cu_seqlens is not None or key_padding_mask is not None:
            raise ConfigError(
                f"{op}: mask stands instead of window, cu_seqlens and key_padding_mask; give one or the others"
            )
        check_shape(op, "mask", mask, "(B, T, S)", (batch, queries, keys))
        _check_bool("mask", mask)
        return
    if keys < queries:
        raise ConfigError(f"{op}: k has {keys} positions, expected at least the {queries} of q")
    if key_padding_mask is not None:
        check_shape(op, "key_padding_mask", key_padding_mask, "(B, S)", (batch, keys))
        _check_bool("key_padding_mask", key_padding_mask)
    if cu_seqlens is not None:
        if key_padding_mask is not None or keys != queries:
            raise ConfigError(f"{op}: cu_seqlens needs as many keys as queries and no key_padding_mask")
        check_segments(op, cu_seqlens, batch, queries)


def _check_bool(name: str, mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise ConfigError(f"attention: {name} has dtype {mask.dtype}, expected torch.bool")
