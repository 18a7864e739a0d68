"""The short causal convolution of a chunk with its SiLU and its final state, in Triton. Not yet run on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridvl.layers.ops.kernels.triton_common import on_device, power_of_two
from hybridvl.layers.ops.kernels.triton_device import silu

_TOKENS, _CHANNELS = 16, 128  # of a program: neighbours read the same inputs from the cache


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor]:
    """See `layers.ops.causal_conv`; rows that are not packed, forward only."""
    x, weight = x.contiguous(), weight.contiguous()
    state = None if initial_state is None else initial_state.to(x.dtype).contiguous()
    bias = None if bias is None else bias.contiguous()
    batch, tokens, channels = x.shape
    width = weight.shape[1]
    y, final = torch.empty_like(x), torch.empty(batch, channels, width, dtype=x.dtype, device=x.device)
    if final.numel():
        size = min(_TOKENS, power_of_two(max(tokens, 1)))
        with on_device(x):
            _convolve[(max(triton.cdiv(tokens, size), 1), triton.cdiv(channels, _CHANNELS), batch)](
                x, weight, bias, state, y, final, tokens, channels, width, state is not None, bias is not None,
                activation == "silu", power_of_two(width), size, _CHANNELS, num_warps=4,
            )  # fmt: skip
    return y, final


@triton.jit
def _input(x, state, at, early, channel, mask, tokens, channels, WIDTH: tl.constexpr, CARRIED: tl.constexpr):
    """Inputs at times that may, if early, lie before the chunk: those are the state's, or zero."""
    value = tl.load(x + at.to(tl.int64) * channels + channel, mask=mask & (at >= 0) & (at < tokens), other=0.0)
    if CARRIED:  # noqa: SIM102 - this one is decided when it is compiled
        if early:
            old = tl.load(state + channel * WIDTH + WIDTH + at, mask=mask & (at < 0) & (at >= -WIDTH), other=0.0)
            value = tl.where(at < 0, old, value)
    return value


@triton.jit
def _convolve(
    x, weight, bias, state, y, final, tokens, channels, WIDTH: tl.constexpr, CARRIED: tl.constexpr,
    BIASED: tl.constexpr, ACTIVATED: tl.constexpr, TAPS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    x += row * tokens * channels
    y += row * tokens * channels
    final += row * channels * WIDTH
    if CARRIED:
        state += row * channels * WIDTH
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    time = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    inside, early = channel < channels, tl.program_id(0) * TOKENS < WIDTH
    total = tl.zeros((TOKENS, CHANNELS), tl.float32)
    for tap in tl.static_range(WIDTH):
        given = _input(x, state, time - (WIDTH - 1 - tap), early, channel, inside, tokens, channels, WIDTH, CARRIED)
        total += given.to(tl.float32) * tl.load(weight + channel * WIDTH + tap, mask=inside, other=0.0).to(tl.float32)
    if BIASED:
        total += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATED:
        total = silu(total)
    tl.store(y + time.to(tl.int64) * channels + channel, total.to(y.dtype.element_ty), mask=inside & (time < tokens))
    if tl.program_id(0) == tl.num_programs(0) - 1:
        place = tl.arange(0, TAPS)[:, None]
        kept = inside & (place < WIDTH)
        last = _input(x, state, tokens - WIDTH + place, early, channel, kept, tokens, channels, WIDTH, CARRIED)
        tl.store(final + channel * WIDTH + place, last, mask=kept)
