"""Rotary position embedding in one pass, in Triton. Not yet run on a GPU.

A program takes all heads of one token, so that it reads the token's tables once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridvl.layers.ops.kernels.triton_common import on_device, power_of_two

_WIDE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `layers.ops.rotary`; products are rounded as there."""
    x, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, cos, sin))
    batch, tokens, heads, dim = x.shape
    cos, sin = cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        with on_device(x):
            _rotate[(tokens, batch)](
                x, cos, sin, y, *x.stride()[:3], *cos.stride()[:2], *sin.stride()[:2], tokens, heads, dim // 2,
                _WIDE[torch.promote_types(x.dtype, cos.dtype)], power_of_two(heads), power_of_two(dim // 2),
                num_warps=4,
            )  # fmt: skip
    return y


@triton.jit
def _rotate(
    x, cos, sin, y, x_row, x_token, x_head, cos_row, cos_token, sin_row, sin_token, tokens, heads, HALF: tl.constexpr,
    WIDE: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head, column = tl.arange(0, HEADS).to(tl.int64)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = column < HALF
    mask = (head < heads) & inside
    at = row * x_row + token * x_token + head * x_head + column
    first = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x + at + HALF, mask=mask, other=0.0).to(tl.float32)
    cos_at, sin_at = row * cos_row + token * cos_token + column, row * sin_row + token * sin_token + column
    near_cos, near_sin = tl.load(cos + cos_at, mask=inside, other=0.0), tl.load(sin + sin_at, mask=inside, other=0.0)
    far_cos = tl.load(cos + cos_at + HALF, mask=inside, other=0.0).to(WIDE).to(tl.float32)
    far_sin = tl.load(sin + sin_at + HALF, mask=inside, other=0.0).to(WIDE).to(tl.float32)
    # As PyTorch rounds: the first product to the dtype in which it is formed, then one fused multiplication and sum.
    near = (first * near_cos.to(WIDE).to(tl.float32)).to(WIDE).to(tl.float32)
    near = tl.fma(second, -near_sin.to(WIDE).to(tl.float32), near)
    far = tl.fma(first, far_sin, (second * far_cos).to(WIDE).to(tl.float32))
    to = y + ((row * tokens + token) * heads + head) * (2 * HALF) + column
    tl.store(to, near.to(WIDE).to(y.dtype.element_ty), mask=mask)
    tl.store(to + HALF, far.to(WIDE).to(y.dtype.element_ty), mask=mask)
