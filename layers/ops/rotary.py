"""Rotary position embedding in the rotate-half form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridvl.layers.ops.backend import resolve_backend


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, backend: str = "auto") -> Tensor:
    """Rotate x (B, T, H, K) by the tables cos, sin (B, T, K); same shape and dtype as x.

    The tables hold each of the K/2 frequencies twice, [f, f], so that dimension i pairs with i + K/2 (RoFormer,
    arXiv 2104.09864, in the layout of GPT-NeoX and Qwen2.5-VL), and get no gradient. The product is formed in the wider
    of the two dtypes. Backends: "reference", "torch", "triton" (CUDA).
    """
    chosen = resolve_backend("rotary", backend, x.device, torch.promote_types(x.dtype, cos.dtype), x.shape[-1])
    if torch.is_grad_enabled() and x.requires_grad:
        rotated: Tensor = _Rotation.apply(x, cos, sin, chosen)
        return rotated
    return _rotate(x, cos, sin, chosen)


class _Rotation(torch.autograd.Function):
    """Keeps the tables alone: the gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, chosen: str) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.chosen = chosen
        return _rotate(x, cos, sin, chosen)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return apply_rotary(grad, cos, -sin, ctx.chosen), None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, chosen: str) -> Tensor:
    if chosen == "triton":
        from hybridvl.layers.ops.kernels import triton_rotary

        return triton_rotary.rotate(x, cos, sin)
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    half = x.shape[-1] // 2
    cos, sin = (table.to(wide.dtype).unsqueeze(2) for table in (cos, sin))
    if chosen == "reference":
        turned = torch.cat((-wide[..., half:], wide[..., :half]), dim=-1)
        return (wide * cos + turned * sin).to(x.dtype)
    out = wide * cos  # (B, T, H, K)
    out[..., :half].addcmul_(wide[..., half:], -sin[..., :half])
    out[..., half:].addcmul_(wide[..., :half], sin[..., half:])
    return out.to(x.dtype)


def rotary_table(
    positions: Tensor, dim: int, theta: float = 10000.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Tables (cos, sin), each (*positions.shape, dim), for one-dimensional positions; angles in float64."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
    angles = positions.to(torch.float64).unsqueeze(-1) * theta**-exponents  # (..., dim / 2)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)
