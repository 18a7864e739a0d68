"""One token of a Mamba2 layer between its projections, with states that are updated in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridvl.layers.errors import ConfigError
from hybridvl.layers.ops.backend import resolve_backend
from hybridvl.layers.ops.checks import check_floating, check_shape, full_precision, internal_dtype
from hybridvl.layers.ops.conv_step import causal_conv_step, causal_conv_step_reference
from hybridvl.layers.ops.delta_step import FORGETS_ALL


@torch.no_grad()
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
    norm_eps: float = 1e-5,
    groups: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Convolution and SiLU, step size, recurrence, skip, gated norm: y (B, H * P) of one token a row.

    z: (B, H * P), channels: (B, H * P + 2 * G * N) holding x, B and C, dt: (B, H): the parts of the token's projection.
    recurrent: (B, H, P, N) in float32 (float64 for float64); conv: (B, channels, W), the last W inputs, oldest first.
    Both states are updated IN PLACE, at their addresses. conv_weight: (channels, W), conv_bias: (channels,) or None.
    A_log, dt_bias, D: (H,). norm_weight: (H * P,). groups: G of B and C (head h uses group h // (H / G)), and of the
    norm.
    x, B, C = silu(conv(channels)); dt = softplus(dt + dt_bias); S = e^(-dt e^A_log) S + dt x B^T;
    y = groupnorm((S C + D x) silu(z)) norm_weight.
    No autograd. Computes in float32 (float64 for float64) and returns y in z's dtype. Nothing is read on the host, and
    nothing in the shapes depends on data. Backends: "reference", "torch", "triton" (CUDA).
    Raises ConfigError naming a misshapen argument.
    """
    _check(z, channels, dt, recurrent, conv, conv_weight, groups)
    heads, head_dim, state_dim = recurrent.shape[1:]
    chosen = resolve_backend("mamba2_step", backend, z.device, z.dtype, state_dim, head_dim, 1)
    if chosen == "triton":
        from hybridvl.layers.ops.kernels import triton_mamba2_step

        return triton_mamba2_step.mamba2_step(
            z, channels, dt, recurrent, conv, conv_weight, conv_bias, A_log, dt_bias, D, norm_weight, norm_eps, groups
        )  # fmt: skip
    plain = chosen == "reference"
    convolve, recur = (causal_conv_step_reference, _recur_reference) if plain else (causal_conv_step, _recur)
    wide = internal_dtype(z, recurrent)
    convolved = convolve(channels, conv, conv_weight, conv_bias)
    x, b, c = convolved.split((heads * head_dim, groups * state_dim, groups * state_dim), dim=-1)
    x = x.unflatten(-1, (heads, head_dim))
    step = F.softplus(dt.to(wide) + dt_bias.to(wide))  # (B, H)
    with full_precision(z.device):
        y = recur(
            x * step.unsqueeze(-1),
            step * -A_log.to(wide).exp(),
            b.unflatten(-1, (groups, state_dim)),
            c.unflatten(-1, (groups, state_dim)),
            recurrent,
        )
    y = torch.addcmul(y, x, D.to(wide).unsqueeze(-1)).flatten(1) * F.silu(z.to(wide))
    y = F.rms_norm(y.view(len(y), groups, -1), (y.shape[1] // groups,), eps=norm_eps).view_as(y)
    return (y * norm_weight.to(wide)).to(z.dtype)


def _recur(x: Tensor, g: Tensor, b: Tensor, c: Tensor, state: Tensor) -> Tensor:
    """S = e^g S + x B^T, in place; S C (B, H, P): x (B, H, P), g (B, H), b and c (B, G, N), state (B, H, P, N)."""
    rows, groups, state_dim = b.shape
    state.mul_(torch.threshold(g, FORGETS_ALL, -torch.inf).exp_()[..., None, None])
    grouped = state.view(rows * groups, -1, state_dim)  # (B * G, H / G * P, N)
    torch.baddbmm(grouped, x.reshape(rows * groups, -1, 1), b.reshape(rows * groups, 1, -1), out=grouped)
    return torch.bmm(c.reshape(rows * groups, 1, -1), grouped.mT).view(x.shape)


def _recur_reference(x: Tensor, g: Tensor, b: Tensor, c: Tensor, state: Tensor) -> Tensor:
    """The definition; arguments and result of `_recur`."""
    b, c = (t.repeat_interleave(state.shape[1] // b.shape[1], dim=1) for t in (b, c))  # (B, H, N)
    state.copy_(state * g.exp()[..., None, None] + x.unsqueeze(-1) @ b.unsqueeze(-2))
    return (state @ c.unsqueeze(-1)).squeeze(-1)


def _check(
    z: Tensor, channels: Tensor, dt: Tensor, recurrent: Tensor, conv: Tensor, conv_weight: Tensor, groups: int
) -> None:
    op = "mamba2_step"
    check_floating(op, {"z": z, "channels": channels, "dt": dt, "recurrent": recurrent, "conv": conv})
    check_shape(op, "recurrent", recurrent, "(B, H, P, N)", (None, None, None, None))
    batch, heads, head_dim, state_dim = recurrent.shape
    if groups < 1 or heads % groups:
        raise ConfigError(f"{op}: groups is {groups}, expected a divisor of the {heads} heads")
    check_shape(op, "z", z, "(B, H * P)", (batch, heads * head_dim))
    width = heads * head_dim + 2 * groups * state_dim
    check_shape(op, "channels", channels, "(B, H * P + 2 * G * N)", (batch, width))
    check_shape(op, "dt", dt, "(B, H)", (batch, heads))
    check_shape(op, "conv_weight", conv_weight, "(channels, W)", (width, None))
    check_shape(op, "conv", conv, "(B, channels, W)", (batch, width, conv_weight.shape[1]))
