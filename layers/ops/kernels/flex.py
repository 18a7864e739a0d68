"""Attention by PyTorch's FlexAttention: masked blocks are skipped, for windows and for packed segments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, bounds: Tensor | None) -> Tensor:
    """See `layers.ops.attention`; bounds: cu_seqlens. Compiled on CUDA (not yet run there), eager elsewhere."""
    segments = None if bounds is None else tuple(bounds.tolist())
    mask = _block_mask(q.shape[1], k.shape[1], window, segments, q.device)
    query, key, value = (x.to(q.dtype).transpose(1, 2) for x in (q, k, v))
    run = _compiled() if q.is_cuda else _flex_attention()
    o: Tensor = run(query, key, value, block_mask=mask, scale=scale, enable_gqa=q.shape[2] != k.shape[2])
    return o.transpose(1, 2)


@functools.lru_cache(maxsize=32)
def _block_mask(
    queries: int, keys: int, window: int | None, segments: tuple[int, ...] | None, device: torch.device
) -> Any:
    """One for all layers: they share lengths and segments."""
    from torch.nn.attention.flex_attention import create_block_mask

    offset, width = keys - queries, window or keys
    segment = torch.zeros(keys, dtype=torch.int32, device=device)
    for start in segments or ():
        segment[start:] += 1

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        at = query + offset
        return (key <= at) & (at - key < width) & (segment[at] == segment[key])

    return create_block_mask(seen, None, None, queries, keys, device=device)


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(_flex_attention())


def _flex_attention() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention
