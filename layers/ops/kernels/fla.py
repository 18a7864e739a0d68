"""The chunked recurrences by flash-linear-attention's Triton kernels. Not yet run on a GPU from here."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from torch import Tensor

_Kernel = Callable[..., tuple[Tensor, Tensor]]


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    scale: float,
    qk_l2norm: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `layers.ops.gated_delta_rule`."""
    kernel: _Kernel = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    return kernel(
        _repeated(q, v),
        _repeated(k, v),
        v,
        g.float(),
        beta,
        scale=scale,
        initial_state=None if initial_state is None else initial_state.float(),
        output_final_state=True,
        cu_seqlens=cu_seqlens,
        use_qk_l2norm_in_kernel=qk_l2norm,
    )


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `layers.ops.ssd`, without D: linear attention with one decay per head, queries C, keys B, values dt x."""
    kernel: _Kernel = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
    y, final = kernel(
        _repeated(C, x),
        _repeated(B, x),
        (x.float() * dt.float()[..., None]).to(x.dtype),
        dt.float() * A.float(),
        scale=1.0,
        initial_state=None if initial_state is None else initial_state.float().mT.contiguous(),
        output_final_state=True,
        cu_seqlens=cu_seqlens,
    )
    return y, final.mT


def _repeated(x: Tensor, v: Tensor) -> Tensor:
    """Shared heads (B, T, Hk, K) as (B, T, H, K) in the dtype of v (B, T, H, V)."""
    return x.repeat_interleave(v.shape[2] // x.shape[2], dim=2).to(v.dtype)
