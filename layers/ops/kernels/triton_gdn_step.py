"""One token of a Gated DeltaNet layer in two Triton kernels, states in place. Not yet run on a GPU.

The first runs convolutions, unit norms and the delta rule on blocks of value columns, which share nothing but what they
read. The second needs all of a head: it norms and gates, and shifts the convolutions' states when no one reads them any
more. Nothing waits for the host and all addresses but the output's and a scratch buffer's are the caller's, so a CUDA
graph can hold it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridvl.layers.ops.kernels.triton_common import check_contiguous, on_device, power_of_two
from hybridvl.layers.ops.kernels.triton_device import convolved, shift, sigmoid, silu, softplus

_COLUMNS = 32  # value columns of a program: 128 programs at 16 heads of 256


def gated_delta_net_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    a: Tensor,
    b: Tensor,
    recurrent: Tensor,
    convs: tuple[Tensor, Tensor, Tensor],
    weights: tuple[Tensor, Tensor, Tensor],
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    norm_eps: float,
    negative_eigenvalues: bool,
    l2_eps: float,
) -> Tensor:
    """See `layers.ops.gdn_step`; convs, weights: of q, k and v. The states must be contiguous."""
    states = dict(zip(("conv_q", "conv_k", "conv_v"), convs, strict=True))
    check_contiguous("gated_delta_net_step", {"recurrent": recurrent, **states})
    batch, heads, key_dim, value_dim = recurrent.shape
    q, k, v, a, b = (x.contiguous() for x in (q, k, v, a, b))
    wq, wk, wv = (w.contiguous() for w in weights)
    gate = None if gate is None else gate.contiguous()
    repeats = heads * key_dim // q.shape[1]
    width = wq.shape[1]
    o = torch.empty(batch, heads, value_dim, dtype=torch.float32, device=v.device)
    y = torch.empty_like(v)
    if not y.numel():
        return y
    columns = min(_COLUMNS, power_of_two(value_dim))
    with on_device(v):
        _rule[(triton.cdiv(value_dim, columns), heads, batch)](
            q, k, v, a, b, recurrent, *convs, wq, wk, wv, A_log, dt_bias, o,
            key_dim**-0.5, l2_eps, 2.0 if negative_eigenvalues else 1.0,
            heads, repeats, key_dim, value_dim, width, power_of_two(key_dim), columns, num_warps=4,
        )  # fmt: skip
        _finish[(heads, batch)](
            q, k, v, gate, o, norm_weight, y, *convs, norm_eps, heads, repeats, key_dim, value_dim, width,
            gate is not None, power_of_two(width), power_of_two(value_dim), 128, num_warps=4,
        )  # fmt: skip
    return y


@triton.jit
def _rule(
    q, k, v, a, b, recurrent, conv_q, conv_k, conv_v, q_weight, k_weight, v_weight, A_log, dt_bias, o,
    scale, l2_eps, rate, HEADS: tl.constexpr, REPEATS: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """S (K, V) of one head: columns of the new state, and of what the query reads."""
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    keys: tl.constexpr = HEADS // REPEATS * K
    values: tl.constexpr = HEADS * V
    index, column = tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    key_mask, value_mask = index < K, column < V
    channel = head // REPEATS * K + index
    query = silu(convolved(q + row * keys, conv_q + row * keys * WIDTH, q_weight, channel, key_mask, WIDTH))
    key = silu(convolved(k + row * keys, conv_k + row * keys * WIDTH, k_weight, channel, key_mask, WIDTH))
    query *= scale * tl.rsqrt(tl.sum(query * query, 0) + l2_eps)
    key *= tl.rsqrt(tl.sum(key * key, 0) + l2_eps)
    value = silu(
        convolved(v + row * values, conv_v + row * values * WIDTH, v_weight, head * V + column, value_mask, WIDTH)
    )
    step = softplus(tl.load(a + row * HEADS + head).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32))
    decay = tl.exp(-tl.exp(tl.load(A_log + head).to(tl.float32)) * step)
    beta = rate * sigmoid(tl.load(b + row * HEADS + head).to(tl.float32))
    at = recurrent + ((row * HEADS + head) * K + index[:, None]) * V + column[None, :]
    mask = key_mask[:, None] & value_mask[None, :]
    state = tl.load(at, mask=mask, other=0.0) * decay
    change = beta * (value - tl.sum(key[:, None] * state, 0))
    state += key[:, None] * change[None, :]
    tl.store(at, state, mask=mask)
    tl.store(o + (row * HEADS + head) * V + column, tl.sum(query[:, None] * state, 0), mask=value_mask)


@triton.jit
def _finish(
    q, k, v, gate, o, norm_weight, y, conv_q, conv_k, conv_v, norm_eps,
    HEADS: tl.constexpr, REPEATS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr,
    GATED: tl.constexpr, TAPS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gated norm of a head, and the new inputs in its convolutions' states."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    keys: tl.constexpr = HEADS // REPEATS * K
    values: tl.constexpr = HEADS * V
    column = tl.arange(0, COLUMNS)
    mask = column < V
    at = row * values + head * V + column
    out = tl.load(o + at, mask=mask, other=0.0)
    out *= tl.rsqrt(tl.sum(out * out, 0) / V + norm_eps) * tl.load(norm_weight + column, mask=mask, other=0.0).to(
        tl.float32
    )
    if GATED:
        out *= silu(tl.load(gate + at, mask=mask, other=0.0).to(tl.float32))
    tl.store(y + at, out.to(y.dtype.element_ty), mask=mask)
    shift(v + row * values, conv_v + row * values * WIDTH, head * V, head * V + V, WIDTH, TAPS, CHANNELS)
    if head % REPEATS == 0:
        first = head // REPEATS * K
        shift(q + row * keys, conv_q + row * keys * WIDTH, first, first + K, WIDTH, TAPS, CHANNELS)
        shift(k + row * keys, conv_k + row * keys * WIDTH, first, first + K, WIDTH, TAPS, CHANNELS)
