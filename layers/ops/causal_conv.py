"""Short causal depthwise convolution along time, with its carried state."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridvl.layers.errors import ConfigError
from hybridvl.layers.ops.backend import resolve_backend
from hybridvl.layers.ops.blocked_conv import Span, blocked_conv
from hybridvl.layers.ops.checks import check_floating, check_segments, check_shape, full_precision, internal_dtype
from hybridvl.layers.ops.packing import map_segments

_SHORT = 1 << 15  # numbers in a segment, below which it costs less to be copied than to be called for


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    activation: str | None = "silu",
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """y[t] = act(bias + sum_w weight[:, w] * x[t - W + 1 + w]) for each channel.

    x: (B, T, D). weight: (D, W), the last column meets the newest input. bias: (D,).
    initial_state: (N, D, W), the last W inputs before x, oldest first (its oldest column is never read); zeros if None.
    activation: "silu" or None. cu_seqlens: (N + 1,) boundaries of the segments packed into one row (B = 1).
    Returns y (B, T, D) and the final state (N, D, W), N = B when not packed, both in x's dtype: the state only copies
    inputs. Sums are taken in float32 (float64 for float64 input). Backends: "reference", "torch", "triton" (CUDA,
    without gradients and packing). Raises ConfigError naming a misshapen argument.
    """
    _check(x, weight, bias, initial_state, activation, cu_seqlens)
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias, initial_state)
    )
    chosen = resolve_backend("causal_conv", backend, x.device, x.dtype, grad=needs_grad, packed=cu_seqlens is not None)
    if chosen == "triton":
        from hybridvl.layers.ops.kernels import triton_conv

        return triton_conv.causal_conv(x, weight, bias, initial_state, activation)
    # A compiler fuses whole sequences itself, and for other devices than a CPU there is no cache to be cut for.
    if chosen == "torch" and x.device.type == "cpu" and not torch.compiler.is_compiling():
        if cu_seqlens is not None and x.numel() < _SHORT * (len(cu_seqlens) - 1):
            return _joined(x, weight, bias, initial_state, activation, cu_seqlens)
        return blocked_conv(x, weight, bias, initial_state, activation, _spans(x, cu_seqlens))
    run = _reference if chosen == "reference" else _torch

    def segments(tokens: list[Tensor], state: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        (rows,) = tokens
        state = rows.new_zeros(rows.shape[0], *weight.shape) if state is None else state.to(rows.dtype)
        inputs = torch.cat([state.transpose(1, 2), rows], dim=1)  # (N, W + T, D)
        with full_precision(x.device):
            y = run(inputs[:, 1:], weight, bias, activation)
        return y.to(x.dtype), _last_inputs(inputs, weight.shape[1], lengths)

    if cu_seqlens is None:
        return segments([x], initial_state, None)
    y, final = map_segments(segments, [x], initial_state, cu_seqlens)
    assert final is not None
    return y, final


def _spans(x: Tensor, cu_seqlens: Tensor | None) -> list[Span]:
    if cu_seqlens is None:
        return [Span(row, 0, x.shape[1]) for row in range(x.shape[0])]
    return [Span(0, start, stop) for start, stop in itertools.pairwise(cu_seqlens.tolist())]


def _joined(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, activation: str | None, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """Segments as one sequence, each after its own W inputs before it: one call, however many there are."""
    width, count, tokens = weight.shape[1], len(cu_seqlens) - 1, x.shape[1]
    before = x.new_zeros(count, width, x.shape[2]) if state is None else state.mT.to(x.dtype)
    number = torch.arange(count).repeat_interleave(cu_seqlens.diff())  # (T,) which segment a token is of
    place = torch.arange(tokens) + width * (number + 1)  # of the tokens among all
    starts = cu_seqlens[:-1] + width * torch.arange(count)
    ends = cu_seqlens[1:] + width * torch.arange(1, count + 1)
    reach = torch.arange(width)
    places = torch.cat(((starts[:, None] + reach).flatten(), place))
    order = places.argsort()
    read = torch.cat((torch.zeros_like(before[:, :1]), before[:, 1:]), dim=1)  # the oldest is none of a sum's inputs
    rows = torch.cat((read.flatten(0, 1), x[0])).index_select(0, order)
    y, _ = blocked_conv(rows[None], weight, bias, None, activation, [Span(0, 0, len(rows))])
    last = order[(ends[:, None] - width + reach).flatten()]
    final = torch.cat((before.flatten(0, 1), x[0])).index_select(0, last).unflatten(0, (count, width)).mT
    return y[0].index_select(0, place)[None], final.contiguous()


def _reference(inputs: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """The definition, token by token: inputs (B, W - 1 + T, D) -> (B, T, D)."""
    dtype = internal_dtype(inputs, weight)
    inputs, weight = inputs.to(dtype), weight.to(dtype)
    width = weight.shape[1]
    outputs = []
    for t in range(inputs.shape[1] - width + 1):
        y = (inputs[:, t : t + width] * weight.T).sum(1)  # (B, D)
        outputs.append(y if bias is None else y + bias.to(dtype))
    y = torch.stack(outputs, dim=1) if outputs else inputs[:, :0]
    return F.silu(y) if activation == "silu" else y


def _torch(inputs: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    y: Tensor = _Convolution.apply(inputs, weight, bias, activation)
    return y


class _Convolution(torch.autograd.Function):
    """W shifted products over whole sequences, (B, W - 1 + T, D) -> (B, T, D): no transposition, unlike `conv1d`.

    The backward pass keeps the inputs alone and computes the sums before the activation again.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
        ctx.save_for_backward(inputs, weight, bias)
        ctx.activation = activation
        dtype = internal_dtype(inputs, weight)
        y = _shifted_sum(inputs.to(dtype), weight.to(dtype), bias)
        return F.silu(y, inplace=True) if activation == "silu" else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, bias = ctx.saved_tensors
        dtype = internal_dtype(inputs, weight)
        wide, factors = inputs.to(dtype), weight.to(dtype)
        if ctx.activation == "silu":
            dy = torch.ops.aten.silu_backward(dy, _shifted_sum(wide, factors, bias))
        tokens, width = dy.shape[1], weight.shape[1]
        dinputs = torch.zeros_like(wide)
        dweight = torch.empty_like(factors)
        for w in range(width):
            dinputs[:, w : w + tokens].addcmul_(dy, factors[:, w])
            dweight[:, w] = (dy * wide[:, w : w + tokens]).sum((0, 1))
        dbias = None if bias is None else dy.sum((0, 1)).to(bias.dtype)
        return dinputs.to(inputs.dtype), dweight.to(weight.dtype), dbias, None


def _shifted_sum(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    tokens = inputs.shape[1] - weight.shape[1] + 1
    y = inputs[:, :tokens] * weight[:, 0]
    for w in range(1, weight.shape[1]):
        y.addcmul_(inputs[:, w : w + tokens], weight[:, w])
    return y if bias is None else y.add_(bias)


def _last_inputs(inputs: Tensor, width: int, lengths: Tensor | None) -> Tensor:
    """(N, W + T, D), of which W + length are real -> the last W real ones, (N, D, W)."""
    if lengths is None:
        return inputs[:, inputs.shape[1] - width :].transpose(1, 2).contiguous()
    index = lengths[:, None] + torch.arange(width, device=inputs.device)  # (N, W)
    return inputs.gather(1, index[..., None].expand(-1, -1, inputs.shape[2])).transpose(1, 2).contiguous()


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
) -> None:
    op = "causal_conv"
    check_floating(op, {"x": x, "weight": weight, "bias": bias, "initial_state": initial_state})
    check_shape(op, "x", x, "(B, T, D)", (None, None, None))
    batch, tokens, width = x.shape
    check_shape(op, "weight", weight, "(D, W)", (width, None))
    if weight.shape[1] < 1:
        raise ConfigError(f"{op}: weight has width 0, expected at least 1")
    if bias is not None:
        check_shape(op, "bias", bias, "(D,)", (width,))
    check_segments(op, cu_seqlens, batch, tokens)
    if initial_state is not None:
        rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        check_shape(op, "initial_state", initial_state, "(N, D, W)", (rows, width, weight.shape[1]))
    if activation not in ("silu", None):
        raise ConfigError(f"{op}: activation is {activation!r}, expected 'silu' or None")
