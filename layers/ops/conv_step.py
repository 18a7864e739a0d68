"""One token of the short causal convolution, with the last inputs shifted in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridvl.layers.ops.checks import internal_dtype


def causal_conv_step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """SiLU of the convolution at one new input x (B, D): (B, D) in float32, or float64 when something is.

    state: (B, D, W), the last W inputs, oldest first, shifted in place. weight: (D, W). bias: (D,). Outside
    autograd.
    """
    if state.is_contiguous():
        flat = state.view(-1)  # shifting it by one shifts every channel, whose last place is written over
        flat[:-1].copy_(flat[1:].clone())
    else:
        state.copy_(state.roll(-1, dims=-1))
    state[..., -1] = x
    dtype = internal_dtype(x, state)
    products = (state.to(dtype) * weight.to(dtype)).view(-1, weight.shape[1])  # (B * D, W)
    y = torch.mv(products, products.new_ones(weight.shape[1])).view(x.shape)
    return F.silu(y if bias is None else y.add_(bias), inplace=True)


def causal_conv_step_reference(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition; arguments and result of `causal_conv_step`."""
    state.copy_(torch.cat((state[:, :, 1:], x.to(state.dtype).unsqueeze(-1)), dim=-1))
    dtype = internal_dtype(x, state)
    y = (state.to(dtype) * weight.to(dtype)).sum(-1)
    return F.silu(y if bias is None else y + bias.to(dtype))
