"""The short causal convolution on a CPU, forward and backward, in blocks of tokens that stay in a core's cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridvl.layers.ops.checks import internal_dtype

_BLOCK = 1 << 18  # numbers in a block: temporaries of this size are recycled, larger ones come as fresh pages


class Span(NamedTuple):
    """Tokens start to stop of row `row` of a batch: a sequence, or one of several packed into the row."""

    row: int
    start: int
    stop: int


def blocked_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, activation: str | None, spans: list[Span]
) -> tuple[Tensor, Tensor]:
    """See `causal_conv`; x (B, T, D), state (N, D, W), one span for each of the N sequences, which cover x.

    Keeps nothing but its inputs for the backward pass. Differentiable once.
    """
    y, final = _BlockedConv.apply(x, weight, bias, state, activation, spans)
    return y, final


class _BlockedConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor | None,
        activation: str | None,
        spans: list[Span],
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, bias, state)
        ctx.set_materialize_grads(False)
        ctx.options = activation, spans
        taps, offset = _wide(weight, bias, internal_dtype(x, weight))
        y = torch.empty(x.shape, dtype=x.dtype)
        for n, span in enumerate(spans):
            for start, stop in _blocks(span, x.shape[2]):
                out = y[span.row, start:stop]
                total = out if out.dtype == taps.dtype else torch.empty(out.shape, dtype=taps.dtype)
                _weighted_sum(_inputs(x, state, n, span, start, stop, taps), taps, offset, total)
                if activation == "silu":
                    F.silu(total, inplace=True)
                if total is not out:
                    out.copy_(total)
        return y, _final_state(x, state, spans, weight.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
        x, weight, bias, state = ctx.saved_tensors
        activation, spans = ctx.options
        taps, offset = _wide(weight, bias, internal_dtype(x, weight))
        before = len(taps) - 1
        dy = x.new_zeros(x.shape) if dy is None else dy
        dx = torch.empty(x.shape, dtype=x.dtype)
        dstate = None if state is None else torch.zeros(state.shape, dtype=state.dtype)
        sums: list[Tensor] = []  # by block: gradients of the taps and, below them, of the offset, (W + 1, D)
        for n, span in enumerate(spans):
            later = taps.new_zeros(before, x.shape[2])  # gradients of the sums of the W - 1 tokens after the block
            for start, stop in reversed(list(_blocks(span, x.shape[2]))):
                inputs = _inputs(x, state, n, span, start, stop, taps)
                dsum = dy[span.row, start:stop].to(taps.dtype)
                if activation == "silu":
                    pre = _weighted_sum(inputs, taps, offset, torch.empty(dsum.shape, dtype=taps.dtype))
                    dsum = torch.ops.aten.silu_backward(dsum, pre)
                sums.append(_tap_gradients(inputs, dsum, len(taps)))
                dsum = torch.cat((dsum, later))
                later = dsum[:before]
                total = torch.empty(stop - start, x.shape[2], dtype=taps.dtype)
                dx[span.row, start:stop] = _weighted_sum(dsum, taps.flip(0), None, total)
            if dstate is not None and before:
                reach = torch.cat((later.new_zeros(before, later.shape[1]), later))  # nothing before the first token
                first = torch.empty_like(later)
                dstate[n, :, 1:] = _weighted_sum(reach, taps.flip(0), None, first).T
        if dfinal is not None:
            _add_final_gradient(dfinal, dx, dstate, spans)
        total = torch.stack(sums).sum(0) if sums else taps.new_zeros(len(taps) + 1, x.shape[2])
        dbias = None if bias is None else total[-1].to(bias.dtype)
        return dx, total[:-1].T.to(weight.dtype), dbias, dstate, None, None


def _wide(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The weights as contiguous rows (W, D), and the bias."""
    return weight.T.to(dtype).contiguous(), None if bias is None else bias.to(dtype)


def _blocks(span: Span, width: int) -> Iterator[tuple[int, int]]:
    tokens = max(_BLOCK // max(width, 1), 1)
    for start in range(span.start, span.stop, tokens):
        yield start, min(start + tokens, span.stop)


def _inputs(x: Tensor, state: Tensor | None, n: int, span: Span, start: int, stop: int, taps: Tensor) -> Tensor:
    """Tokens start - W + 1 to stop of a span, taken from the state where they lie before it: (W - 1 + tokens, D)."""
    before = len(taps) - 1
    missing = max(before - (start - span.start), 0)
    known = x[span.row, start - before + missing : stop].to(taps.dtype)
    if not missing:
        return known
    if state is None:
        return torch.cat((known.new_zeros(missing, known.shape[1]), known))
    return torch.cat((state[n, :, len(taps) - missing :].T.to(x.dtype).to(taps.dtype), known))


def _weighted_sum(inputs: Tensor, taps: Tensor, offset: Tensor | None, out: Tensor) -> Tensor:
    """out[t] = offset + sum_w taps[w] inputs[t + w], (tokens, D)."""
    tokens = len(out)
    if offset is None:
        torch.mul(inputs[:tokens], taps[0], out=out)
    else:
        torch.addcmul(offset, inputs[:tokens], taps[0], out=out)
    for w in range(1, len(taps)):
        out.addcmul_(inputs[w : w + tokens], taps[w])
    return out


def _tap_gradients(inputs: Tensor, dsum: Tensor, width: int) -> Tensor:
    """Gradients of taps and offset from those of the sums of a block: (W + 1, D)."""
    product = torch.empty_like(dsum)
    rows = [torch.mul(dsum, inputs[w : w + len(dsum)], out=product).sum(0) for w in range(width)]
    return torch.stack((*rows, dsum.sum(0)))


def _final_state(x: Tensor, state: Tensor | None, spans: list[Span], width: int) -> Tensor:
    """The last W inputs of every span, (N, D, W)."""
    final = torch.zeros(len(spans), x.shape[2], width, dtype=x.dtype)
    for n, (row, start, stop) in enumerate(spans):
        new = min(stop - start, width)
        if state is not None and new < width:
            final[n, :, : width - new] = state[n, :, new:]
        final[n, :, width - new :] = x[row, stop - new : stop].T
    return final


def _add_final_gradient(dfinal: Tensor, dx: Tensor, dstate: Tensor | None, spans: list[Span]) -> None:
    width = dfinal.shape[2]
    for n, (row, start, stop) in enumerate(spans):
        new = min(stop - start, width)
        dx[row, stop - new : stop] += dfinal[n, :, width - new :].T
        if dstate is not None and new < width:
            dstate[n, :, new:] += dfinal[n, :, : width - new]
