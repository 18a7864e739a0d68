"""One token of a Mamba2 layer in two Triton kernels, states in place. Not yet run on a GPU.

The first runs the convolution and the recurrence on blocks of a head's rows, which share nothing but what they read;
the second norms and gates each group, and shifts the convolution's state when no one reads it any more. Nothing waits
for the host and all addresses but the output's and a scratch buffer's are the caller's, so a CUDA graph can hold it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridvl.layers.ops.kernels.triton_common import check_contiguous, on_device, power_of_two
from hybridvl.layers.ops.kernels.triton_device import convolved, shift, silu, softplus

_ROWS = 32  # of a head's P, in a program


def mamba2_step(
    z: Tensor,
    channels: Tensor,
    dt: Tensor,
    recurrent: Tensor,
    conv: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    norm_eps: float,
    groups: int,
) -> Tensor:
    """See `layers.ops.mamba2_step`. The states must be contiguous."""
    check_contiguous("mamba2_step", {"recurrent": recurrent, "conv": conv})
    batch, heads, head_dim, state_dim = recurrent.shape
    inner, total, width = heads * head_dim, channels.shape[1], conv_weight.shape[1]
    z, channels, dt, conv_weight = (x.contiguous() for x in (z, channels, dt, conv_weight))
    read = torch.empty(batch, inner, dtype=torch.float32, device=z.device)
    y = torch.empty_like(z)
    if not y.numel():
        return y
    rows = min(_ROWS, power_of_two(head_dim))
    with on_device(z):
        _scan[(triton.cdiv(head_dim, rows), heads, batch)](
            channels, dt, recurrent, conv, conv_weight, conv_bias, A_log, dt_bias, D, read,
            conv_bias is not None, heads, groups, head_dim, state_dim, total, width, rows, power_of_two(state_dim),
            num_warps=4,
        )  # fmt: skip
        _finish[(groups + triton.cdiv(total, 1024), batch)](
            z, channels, read, norm_weight, y, conv, norm_eps, groups, inner, total, width,
            power_of_two(width), power_of_two(inner // groups), 128, num_warps=8,
        )  # fmt: skip
    return y


@triton.jit
def _scan(
    channels, dt, recurrent, conv, weight, bias, A_log, dt_bias, D, read,
    BIASED: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    TOTAL: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """S (P, N) of one head: rows of the new state, and of S C + D x."""
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inner: tl.constexpr = HEADS * P
    index, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    row_mask, state_mask = index < P, column < N
    own, state_of = channels + row * TOTAL, conv + row * TOTAL * WIDTH
    first = inner + head // (HEADS // GROUPS) * N
    x = convolved(own, state_of, weight, head * P + index, row_mask, WIDTH)
    into = convolved(own, state_of, weight, first + column, state_mask, WIDTH)
    out = convolved(own, state_of, weight, first + GROUPS * N + column, state_mask, WIDTH)
    if BIASED:
        x += tl.load(bias + head * P + index, mask=row_mask, other=0.0).to(tl.float32)
        into += tl.load(bias + first + column, mask=state_mask, other=0.0).to(tl.float32)
        out += tl.load(bias + first + GROUPS * N + column, mask=state_mask, other=0.0).to(tl.float32)
    x, into, out = silu(x), silu(into), silu(out)
    step = softplus(tl.load(dt + row * HEADS + head).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32))
    decay = tl.exp(-step * tl.exp(tl.load(A_log + head).to(tl.float32)))
    at = recurrent + ((row * HEADS + head) * P + index[:, None]) * N + column[None, :]
    mask = row_mask[:, None] & state_mask[None, :]
    state = tl.load(at, mask=mask, other=0.0) * decay + (step * x)[:, None] * into[None, :]
    tl.store(at, state, mask=mask)
    result = tl.sum(state * out[None, :], 1) + tl.load(D + head).to(tl.float32) * x
    tl.store(read + row * inner + head * P + index, result, mask=row_mask)


@triton.jit
def _finish(
    z, channels, read, norm_weight, y, conv, norm_eps, GROUPS: tl.constexpr, INNER: tl.constexpr, TOTAL: tl.constexpr,
    WIDTH: tl.constexpr, TAPS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The first programs norm and gate a group each, the others put new inputs into the convolution's state."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if part >= GROUPS:
        first = (part - GROUPS) * 1024
        stop = tl.minimum(first + 1024, TOTAL)
        shift(channels + row * TOTAL, conv + row * TOTAL * WIDTH, first, stop, WIDTH, TAPS, CHANNELS)
    else:
        size: tl.constexpr = INNER // GROUPS
        column = tl.arange(0, COLUMNS)
        mask = column < size
        at = row * INNER + part * size + column
        value = tl.load(read + at, mask=mask, other=0.0)
        value *= silu(tl.load(z + at, mask=mask, other=0.0).to(tl.float32))
        value *= tl.rsqrt(tl.sum(value * value, 0) / size + norm_eps)
        value *= tl.load(norm_weight + part * size + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)
