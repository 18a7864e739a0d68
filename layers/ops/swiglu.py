"""The gate of a SwiGLU: silu(gate) up, element by element, without large temporaries on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridvl.layers.ops.backend import resolve_backend

_BLOCK = 1 << 18  # numbers in a block: temporaries of this size are recycled, larger ones come as fresh pages
_FRESH = 1 << 25  # bytes from which a C library maps and unmaps memory at every use


def swiglu(gate: Tensor, up: Tensor, backend: str = "auto") -> Tensor:
    """silu(gate) up, both (..., D) of one dtype, in which everything is computed and rounded (arXiv 2002.05202).

    Backends: "reference", "torch", "triton" (CUDA, without gradients, for tensors of one shape and dtype).
    """
    same = gate.dtype == up.dtype and gate.shape == up.shape
    needs_grad = torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)
    chosen = resolve_backend("swiglu", backend, gate.device, gate.dtype, grad=needs_grad)
    if chosen == "triton" and same:
        from hybridvl.layers.ops.kernels import triton_swiglu

        return triton_swiglu.swiglu(gate, up)
    # Half-precision SiLU is slow to compute again, so there only temporaries that are fresh pages each time cost more.
    large = gate.numel() >= _BLOCK if gate.dtype.itemsize >= 4 else gate.nbytes >= _FRESH
    if chosen == "torch" and same and large and gate.device.type == "cpu" and not torch.compiler.is_compiling():
        y: Tensor = _BlockedSwiGLU.apply(gate, up)
        return y
    return F.silu(gate) * up


class _BlockedSwiGLU(torch.autograd.Function):
    """Keeps its inputs alone; the same roundings as the plain expression."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        y = torch.empty(gate.shape, dtype=gate.dtype)
        for own, other, out in _blocks(gate, up, y):
            torch.mul(F.silu(own), other, out=out)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty(gate.shape, dtype=gate.dtype), torch.empty(up.shape, dtype=up.dtype)
        for own, other, upstream, down, dother in _blocks(gate, up, dy, dgate, dup):
            torch.mul(F.silu(own), upstream, out=dother)
            torch.ops.aten.silu_backward.grad_input(upstream * other, own, grad_input=down)
        return dgate, dup


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    flat = [t.reshape(-1) for t in tensors]
    for start in range(0, flat[0].numel(), _BLOCK):
        yield tuple(t[start : start + _BLOCK] for t in flat)
