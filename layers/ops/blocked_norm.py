"""The gated RMS norm on a CPU, forward and backward, in blocks of rows that stay in a core's cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridvl.layers.ops.checks import internal_dtype

BLOCK = 1 << 18  # numbers in a block: temporaries of this size are recycled, larger ones come as fresh pages


def blocked_norm(
    x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, groups: int, gate_first: bool, cast_first: bool = False
) -> Tensor:
    """See `gated_norm`; cast_first: rmsnorm(x) is rounded to x's dtype before it meets the weight (no gate then).

    Keeps nothing but its inputs for the backward pass. Differentiable once.
    """
    y: Tensor = _BlockedNorm.apply(x, gate, weight, eps, groups, gate_first, cast_first)
    return y


class _BlockedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor | None,
        weight: Tensor,
        eps: float,
        groups: int,
        gate_first: bool,
        cast_first: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, gate, weight)
        ctx.options = eps, groups, gate_first
        dtype = internal_dtype(x, gate, weight)
        factors = (weight if cast_first else weight.to(dtype)).view(groups, -1)
        y = torch.empty(x.shape, dtype=x.dtype)
        for own, opening, out in _blocks(groups, x, gate, y):
            wide = own.to(dtype)
            if gate_first and opening is not None:
                wide = F.silu(opening.to(dtype)).mul_(wide)
            wide = wide * _inverse_root(wide, eps)
            wide = wide.to(x.dtype) * factors if cast_first else wide.mul_(factors)
            if not gate_first and opening is not None:
                wide.mul_(F.silu(opening.to(dtype)))
            out.copy_(wide)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight = ctx.saved_tensors
        eps, groups, gate_first = ctx.options
        dtype = internal_dtype(x, gate, weight)
        factors = weight.to(dtype).view(groups, -1)
        dx = torch.empty(x.shape, dtype=x.dtype)
        dgate = None if gate is None else torch.empty(gate.shape, dtype=gate.dtype)
        partial: list[Tensor] = []  # of the weight's gradient, by block
        for own, opening, upstream, down, dopening in _blocks(groups, x, gate, dy, dx, dgate):
            wide, up = own.to(dtype), upstream.to(dtype)  # (rows, groups, width / groups)
            if opening is None or dopening is None:
                _norm_gradient(wide, up, factors, eps, partial, down)
                continue
            opening = opening.to(dtype)
            swish = F.silu(opening)
            if gate_first:
                normed_input = wide * swish
                inner = torch.empty_like(wide)
                _norm_gradient(normed_input, up, factors, eps, partial, inner)
                torch.mul(inner, swish, out=swish)
                down.copy_(swish)
                dopening.copy_(torch.ops.aten.silu_backward(inner.mul_(wide), opening))
            else:
                normed = _norm_gradient(wide, swish.mul_(up), factors, eps, partial, down)
                dopening.copy_(torch.ops.aten.silu_backward(normed.mul_(factors).mul_(up), opening))
        dweight = torch.stack(partial).sum(0) if partial else torch.zeros_like(factors)
        return dx, dgate, dweight.view(-1).to(weight.dtype), None, None, None, None


def _norm_gradient(x: Tensor, dy: Tensor, weight: Tensor, eps: float, dweight: list[Tensor], dx: Tensor) -> Tensor:
    """Gradients of y = n weight, n = rmsnorm(x), from dy: appends that of the weight, fills dx, returns n.

    With dn = dy weight, dx = (dn - n mean(n dn)) / rms(x).
    """
    inverse = _inverse_root(x, eps)  # (rows, groups, 1)
    normed = x * inverse
    products = normed * dy
    dweight.append(products.sum(0))
    mean = (products.mul_(weight)).sum(-1, keepdim=True).div_(-x.shape[-1])
    dx.copy_(torch.mul(dy, weight, out=products).addcmul_(normed, mean).mul_(inverse))
    return normed


def _inverse_root(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean x^2 + eps) over the last axis, which is kept."""
    return torch.linalg.vecdot(x, x).unsqueeze(-1).div_(x.shape[-1]).add_(eps).rsqrt_()


def _blocks(groups: int, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Blocks (rows, groups, width / groups) of tensors (..., width) side by side, None for None."""
    first = next(t for t in tensors if t is not None)
    width = first.shape[-1]
    flat = [None if t is None else t.reshape(-1, groups, width // groups) for t in tensors]
    rows = max(BLOCK // max(width, 1), 1)
    for start in range(0, first.numel() // max(width, 1), rows):
        yield tuple(None if t is None else t[start : start + rows] for t in flat)
