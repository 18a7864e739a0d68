"""The gate of a SwiGLU in one launch, in Triton. Not yet run on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridvl.layers.ops.kernels.triton_common import on_device
from hybridvl.layers.ops.kernels.triton_device import silu

_BLOCK = 1024  # numbers of a program


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `layers.ops.swiglu`; forward only, rounded as there."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    if y.numel():
        with on_device(y):
            _gate[(triton.cdiv(y.numel(), _BLOCK),)](gate, up, y, y.numel(), _BLOCK, num_warps=4)
    return y


@triton.jit
def _gate(gate, up, y, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    opening = silu(tl.load(gate + at, mask=inside, other=0.0).to(tl.float32))
    opening = opening.to(y.dtype.element_ty).to(tl.float32)
    value = opening * tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)
