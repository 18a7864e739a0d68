"""What the Triton kernels call: activations, and the short convolution of one new input."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def silu(x):
    return x * sigmoid(x)


@triton.jit
def softplus(x):
    # log(1 + e) keeps few digits of a small e: what rounding 1 + e lost is put back as a factor.
    e = tl.exp(-tl.abs(x))
    one = 1.0 + e
    log = tl.where(one == 1.0, e, tl.log(one) * (e / tl.where(one == 1.0, 1.0, one - 1.0)))
    return tl.maximum(x, 0.0) + log


@triton.jit
def convolved(x, state, weight, channels, mask, WIDTH: tl.constexpr):
    """A causal convolution at one new input, float32; its states (channels, WIDTH) are read, not shifted."""
    total = tl.zeros(channels.shape, tl.float32)
    for tap in tl.static_range(WIDTH - 1):
        old = tl.load(state + channels * WIDTH + tap + 1, mask=mask, other=0.0).to(tl.float32)
        total += old * tl.load(weight + channels * WIDTH + tap, mask=mask, other=0.0).to(tl.float32)
    # The new input counts as the state will hold it.
    new = tl.load(x + channels, mask=mask, other=0.0).to(state.dtype.element_ty).to(tl.float32)
    return total + new * tl.load(weight + channels * WIDTH + WIDTH - 1, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def shift(x, state, first, stop, WIDTH: tl.constexpr, TAPS: tl.constexpr, CHANNELS: tl.constexpr):
    """Move the inputs of channels first to stop one to the left in their states (channels, WIDTH) and add the new."""
    tap = tl.arange(0, TAPS)[None, :]
    for start in range(first, stop, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)[:, None]
        real = channel < stop
        new = tl.load(x + channel, mask=real, other=0.0).to(state.dtype.element_ty)
        old = tl.load(state + channel * WIDTH + tap + 1, mask=real & (tap + 1 < WIDTH), other=0.0)
        tl.debug_barrier()  # all is read before anything is written
        tl.store(state + channel * WIDTH + tap, tl.where(tap == WIDTH - 1, new, old), mask=real & (tap < WIDTH))
        tl.debug_barrier()
