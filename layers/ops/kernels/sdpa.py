"""Attention by one call of PyTorch's scaled_dot_product_attention, with a dense mask where it is not plainly causal."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    scale: float,
    bounds: Tensor | None,
    real: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """See `layers.ops.attention`; bounds: cu_seqlens, real: key_padding_mask. On CUDA not yet run."""
    queries, keys = q.shape[1], k.shape[1]
    query, key, value = (x.to(q.dtype).transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[2] != k.shape[2]
    plain = bounds is None and real is None and mask is None and queries == keys and (window or keys) >= keys
    if plain:
        o = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
        return o.transpose(1, 2).to(q.dtype)
    seen = (
        _seen(queries, keys, window, bounds, q.device) if mask is None else mask[:, None]
    )  # broadcasts to (B, H, T, S)
    if real is not None:
        seen = seen & real[:, None, None]
    some = seen.any(-1, keepdim=True)
    o = F.scaled_dot_product_attention(query, key, value, attn_mask=seen | ~some, scale=scale, enable_gqa=grouped)
    return o.masked_fill(~some, 0.0).transpose(1, 2).to(q.dtype)


def _seen(queries: int, keys: int, window: int | None, bounds: Tensor | None, device: torch.device) -> Tensor:
    """(T, S) bool."""
    at = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)
    seen = (key <= at) & (key > at - (window or keys))
    if bounds is None:
        return seen
    segment = torch.searchsorted(bounds.to(device), key, right=True)
    return seen & (segment[at] == segment)
