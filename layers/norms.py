"""Root-mean-square norms, plain and gated, computed in float32 or wider."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hybridvl.layers.ops.gated_norm import gated_rms_norm, rms_norm


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower: the dtype of recurrent states, decays and norms."""
    return torch.promote_types(dtype, torch.float32)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, x (..., width); statistics in float32 or wider, dtype kept.

    arXiv 1910.07467; the cast back comes before the weight, as in Qwen2.5.
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Norm x (..., width)."""
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        """The width and eps, for print(module)."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class GatedRMSNorm(nn.Module):
    """RMSNorm with a SiLU gate of the same shape, x and gate (..., width).

    gate_first False (Gated DeltaNet): rmsnorm(x) * weight * silu(gate).
    gate_first True (Mamba2): rmsnorm(x * silu(gate)) * weight.
    groups: the last axis is cut into this many parts, each with its own mean square. gate None: no gate.
    """

    def __init__(self, width: int, eps: float, groups: int = 1, gate_first: bool = False) -> None:
        super().__init__()
        self.eps, self.groups, self.gate_first = eps, groups, gate_first
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Norm and gate x (..., width)."""
        return gated_rms_norm(x, gate, self.weight, self.eps, self.groups, self.gate_first)

    def extra_repr(self) -> str:
        """The options, for print(module)."""
        order = "gate, then norm" if self.gate_first else "norm, then gate"
        return f"{self.weight.shape[0]}, eps={self.eps}, groups={self.groups}, {order}"
