"""Root-mean-square norm with an optional SiLU gate, in float32 inside."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridvl.layers.errors import ConfigError
from hybridvl.layers.ops.backend import resolve_backend
from hybridvl.layers.ops.blocked_norm import BLOCK, blocked_norm
from hybridvl.layers.ops.checks import check_floating, check_shape, internal_dtype


def gated_rms_norm(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    eps: float,
    groups: int = 1,
    gate_first: bool = False,
    backend: str = "auto",
) -> Tensor:
    """rmsnorm(x) weight silu(gate), or with gate_first rmsnorm(x silu(gate)) weight: (..., width) in x's dtype.

    x: (..., width). gate: like x, no gate if None. weight: (width,). groups: parts of the width, each with its own
    mean square. rmsnorm(x) = x / sqrt(mean x^2 + eps) (arXiv 1910.07467). Computes in float32, in float64 if any input
    is float64. Backends: "reference", "torch", "triton" (CUDA). Raises ConfigError naming a misshapen argument.
    """
    _check(x, gate, weight, groups)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, gate, weight))
    chosen = resolve_backend(
        "gated_rms_norm", backend, x.device, x.dtype, value_dim=weight.shape[0] // groups, grad=needs_grad
    )
    if chosen == "triton":
        from hybridvl.layers.ops.kernels import triton_gated_norm

        return triton_gated_norm.gated_rms_norm(x, gate, weight, eps, groups, gate_first)
    if chosen == "reference" or not _worth_blocks(x):
        return _reference(x, gate, weight, eps, groups, gate_first)
    return blocked_norm(x, gate, weight, eps, groups, gate_first)


def rms_norm(x: Tensor, weight: Tensor, eps: float, backend: str = "auto") -> Tensor:
    """rmsnorm(x) in x's dtype, times weight (width,): (..., width) in x's dtype.

    rmsnorm(x) is computed in float32 or wider and rounded before it meets the weight, as in Qwen2.5. Backends:
    "reference", "torch", "triton" (CUDA).
    """
    chosen = resolve_backend("rms_norm", backend, x.device, x.dtype, value_dim=weight.shape[0])
    if chosen == "triton":
        from hybridvl.layers.ops.kernels import triton_gated_norm

        return triton_gated_norm.gated_rms_norm(x, None, weight, eps, 1, gate_first=False, cast_first=True)
    if chosen == "torch" and _worth_blocks(x):
        return blocked_norm(x, None, weight, eps, 1, False, cast_first=True)
    wide = x.to(internal_dtype(x))
    if chosen == "reference":
        normed = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    else:
        normed = F.rms_norm(wide, weight.shape, eps=eps)
    return (weight * normed.to(x.dtype)).to(x.dtype)


def _worth_blocks(x: Tensor) -> bool:
    """Whether temporaries outgrow the cache of a CPU's core; a compiler fuses the definition and needs none."""
    return x.device.type == "cpu" and x.numel() >= BLOCK and not torch.compiler.is_compiling()


def _reference(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, groups: int, gate_first: bool) -> Tensor:
    """The definition."""
    dtype = internal_dtype(x, gate, weight)
    y, opening = x.to(dtype), None if gate is None else F.silu(gate.to(dtype))
    if opening is not None and gate_first:
        y = y * opening
    y = y.unflatten(-1, (groups, -1))
    y = (y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()).flatten(-2) * weight.to(dtype)
    if opening is not None and not gate_first:
        y = y * opening
    return y.to(x.dtype)


def _check(x: Tensor, gate: Tensor | None, weight: Tensor, groups: int) -> None:
    op = "gated_rms_norm"
    check_floating(op, {"x": x, "gate": gate, "weight": weight})
    check_shape(op, "weight", weight, "(width,)", (None,))
    if x.ndim < 1 or x.shape[-1] != weight.shape[0]:
        raise ConfigError(f"{op}: x has shape {tuple(x.shape)}, expected (..., width) with width = {weight.shape[0]}")
    if gate is not None:
        check_shape(op, "gate", gate, "(..., width)", tuple(x.shape))
    if groups < 1 or weight.shape[0] % groups:
        raise ConfigError(f"{op}: groups is {groups}, expected a divisor of the width {weight.shape[0]}")
