"""Rotary position embedding in the rotate-half form."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, T, H, K) by the tables cos, sin (B, T, K); same shape and dtype as x.

    The tables hold each of the K/2 frequencies twice, [f, f], so that dimension i pairs with i + K/2 (RoFormer,
    arXiv 2104.09864, in the layout of GPT-NeoX and Qwen2.5-VL). The product is formed in the wider of the two dtypes.
    """
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)  # (B, T, H, K)
    return (x * cos.unsqueeze(2) + turned * sin.unsqueeze(2)).to(x.dtype)


def rotary_table(
    positions: Tensor, dim: int, theta: float = 10000.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Tables (cos, sin), each (*positions.shape, dim), for one-dimensional positions; angles in float64."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
    angles = positions.to(torch.float64).unsqueeze(-1) * theta**-exponents  # (..., dim / 2)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)
