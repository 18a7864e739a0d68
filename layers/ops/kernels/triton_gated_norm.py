"""The RMS norm, plain and gated, in one pass over its inputs, forward and backward, in Triton. Not yet run on a GPU."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridvl.layers.ops.kernels.triton_common import on_device, power_of_two, processors
from hybridvl.layers.ops.kernels.triton_device import sigmoid

_TILE = 4096  # numbers a program holds at once


def gated_rms_norm(
    x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, groups: int, gate_first: bool, cast_first: bool = False
) -> Tensor:
    """See `layers.ops.gated_norm`; float32 inside, differentiable once.

    cast_first: rmsnorm(x) is rounded to x's dtype before it meets the weight (no gate then).
    """
    y: Tensor = _GatedNorm.apply(x, gate, weight, (eps, groups, gate_first, cast_first))
    return y


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor | None, weight: Tensor, options: tuple[float, int, bool, bool]
    ) -> Tensor:
        eps, groups, gate_first, cast_first = options
        x, weight = x.contiguous(), weight.contiguous()
        gate = None if gate is None else gate.contiguous()
        ctx.save_for_backward(x, gate, weight)
        ctx.options = options
        y = torch.empty_like(x)
        rows, group, tile = _sizes(x, groups)
        if rows:
            with on_device(x):
                _forward[(triton.cdiv(rows, tile[0]), groups)](
                    x, gate, weight, y, rows, eps, groups * group, group, gate is not None, gate_first, cast_first,
                    *tile, num_warps=_warps(tile),
                )  # fmt: skip
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight = ctx.saved_tensors
        eps, groups, gate_first, cast_first = ctx.options
        dx, dgate = torch.empty_like(x), None if gate is None else torch.empty_like(gate)
        rows, group, tile = _sizes(x, groups)
        programs = min(triton.cdiv(rows, tile[0]), 4 * processors(x)) if rows else 0
        partial = torch.empty(programs, groups * group, dtype=torch.float32, device=x.device)
        if rows:
            with on_device(x):
                _backward[(programs, groups)](
                    x, gate, weight, dy.contiguous(), dx, dgate, partial,
                    rows, eps, groups * group, group, gate is not None, gate_first, cast_first, *tile,
                    num_warps=_warps(tile),
                )  # fmt: skip
        return dx, dgate, partial.sum(0).to(weight.dtype), None


def _sizes(x: Tensor, groups: int) -> tuple[int, int, tuple[int, int]]:
    """Rows, width of a group, and the tile (rows, columns) of a program."""
    width = x.shape[-1]
    columns = power_of_two(width // groups)
    rows = x.numel() // width if width else 0
    return rows, width // groups, (min(max(_TILE // columns, 1), power_of_two(max(rows, 1))), columns)


def _warps(tile: tuple[int, int]) -> int:
    """About 16 numbers a thread, so that a tile and its gradients stay in registers."""
    return min(max(tile[0] * tile[1] // 512, 1), 16)


@triton.jit
def _forward(
    x, gate, weight, y, rows, eps, WIDTH: tl.constexpr, GROUP: tl.constexpr,
    GATED: tl.constexpr, GATE_FIRST: tl.constexpr, CAST_FIRST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows) & (column < GROUP)
    at = row * WIDTH + tl.program_id(1) * GROUP + column
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        opening = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
        opening = opening * sigmoid(opening)
        if GATE_FIRST:
            value *= opening
    value *= tl.rsqrt(tl.sum(value * value, 1) / GROUP + eps)[:, None]
    if CAST_FIRST:
        value = value.to(y.dtype.element_ty).to(tl.float32)
    value *= tl.load(weight + tl.program_id(1) * GROUP + column, mask=column < GROUP, other=0.0).to(tl.float32)
    if GATED and not GATE_FIRST:
        value *= opening
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    x, gate, weight, dy, dx, dgate, partial, rows, eps, WIDTH: tl.constexpr, GROUP: tl.constexpr,
    GATED: tl.constexpr, GATE_FIRST: tl.constexpr, CAST_FIRST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program takes every num_programs-th block of rows and writes its share of the weight's gradient."""
    column = tl.arange(0, COLUMNS)[None, :]
    inside = column < GROUP
    base = tl.program_id(1) * GROUP + column
    scale = tl.load(weight + base, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((1, COLUMNS), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (row < rows) & inside
        at = row * WIDTH + base
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        change = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        u = value
        if GATED:
            raw = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
            share = sigmoid(raw)
            opening = raw * share
            if GATE_FIRST:
                u = value * opening
        inverse = tl.rsqrt(tl.sum(u * u, 1) / GROUP + eps)[:, None]
        unit = u * inverse
        product = change * (unit.to(x.dtype.element_ty).to(tl.float32) if CAST_FIRST else unit)
        through = change * scale  # gradient of unit, up to the gate
        if GATED and not GATE_FIRST:
            slope = share * (1.0 + raw * (1.0 - share))
            tl.store(dgate + at, (product * scale * slope).to(dgate.dtype.element_ty), mask=mask)
            product *= opening
            through *= opening
        total += tl.sum(product, 0)[None, :]
        du = inverse * (through - unit * (tl.sum(through * unit, 1) / GROUP)[:, None])
        if GATED and GATE_FIRST:
            slope = share * (1.0 + raw * (1.0 - share))
            tl.store(dgate + at, (du * value * slope).to(dgate.dtype.element_ty), mask=mask)
            du *= opening
        tl.store(dx + at, du.to(dx.dtype.element_ty), mask=mask)
    tl.store(partial + tl.program_id(0) * WIDTH + base, total, mask=inside)
