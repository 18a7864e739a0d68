"""Attention by the flash-attn package: version 2, or 4 (flash_attn.cute) where that is the one for the device."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_CUTE_CAPABILITY = 10  # from Blackwell on; version 2's kernels were written for Ampere and run on Hopper


def attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, bounds: Tensor | None) -> Tensor:
    """See `layers.ops.attention`; bounds: cu_seqlens. Not yet run on a GPU.

    Queries stand at the last of the keys' positions, as in flash-attn since 2.1.
    """
    plain, packed = _functions(torch.cuda.get_device_capability(q.device)[0] if q.is_cuda else 0)
    # flash-attn counts the keys before the query's own.
    width = (-1, -1) if window is None else (window - 1, 0)
    q, k, v = (x.to(q.dtype) for x in (q, k, v))
    if bounds is None:
        return _first(plain(q, k, v, softmax_scale=scale, causal=True, window_size=width))
    starts = bounds.to(torch.int32)
    longest = int(bounds.diff().max())
    o = packed(
        q[0],
        k[0],
        v[0],
        cu_seqlens_q=starts,
        cu_seqlens_k=starts,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scale,
        causal=True,
        window_size=width,
    )
    return _first(o)[None]


@functools.cache
def _functions(capability: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    names = ("flash_attn", "flash_attn.cute")
    for name in reversed(names) if capability >= _CUTE_CAPABILITY else names:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        if hasattr(module, "flash_attn_func"):  # the package of version 4 alone leaves flash_attn itself empty
            return module.flash_attn_func, module.flash_attn_varlen_func
    raise ImportError("flash_attn is installed, but neither it nor flash_attn.cute has flash_attn_func")


def _first(result: Any) -> Tensor:
    """The output: version 4 returns it with the log-sum-exp."""
    o: Tensor = result[0] if isinstance(result, tuple) else result
    return o
