"""Parameters of a data-dependent decay: their initial values, and their float32 storage in half-precision models."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Float32Parameters(nn.Module):
    """A module whose own parameters (not its children's) stay float32 when it is cast to bfloat16 or float16.

    A decay exp(-exp(A_log) * dt) compounds over thousands of tokens, and the 8 bits of a bfloat16 A_log are too few.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def keep(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return tensor.to(changed.device) if changed.dtype in (torch.bfloat16, torch.float16) else changed

        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(keep, recurse=False)


@torch.no_grad()
def init_decay(
    a_log: Tensor,
    dt_bias: Tensor,
    a_range: tuple[float, float] = (1.0, 16.0),
    dt_range: tuple[float, float] = (0.001, 0.1),
    dt_floor: float = 1e-4,
) -> None:
    """Fill a_log (H,) and dt_bias (H,) in place as Mamba2 and Gated DeltaNet do (arXiv 2405.21060, 2412.06464).

    a_log is the log of uniform values in a_range; dt_bias is such that softplus(dt_bias) is log-uniform in dt_range,
    at least dt_floor.
    """
    a_log.uniform_(*a_range).log_()
    low, high = (math.log(bound) for bound in dt_range)
    step = dt_bias.uniform_(low, high).exp().clamp(min=dt_floor)
    dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
