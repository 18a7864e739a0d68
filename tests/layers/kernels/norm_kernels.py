"""The fused norms, plain and gated, in Triton's interpreter against their definitions: outputs and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_support import assert_near, poisoned
from torch import Tensor

from hybridvl.layers.ops.gated_norm import rms_norm
from hybridvl.layers.ops.kernels.triton_gated_norm import gated_rms_norm


def definition(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, groups: int, gate_first: bool) -> Tensor:
    opening = 1.0 if gate is None else F.silu(gate)
    y = (x * opening if gate_first else x).unflatten(-1, (groups, -1))
    y = (y / (y.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2) * weight
    return y if gate_first else y * opening


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    ("shape", "groups"), [((3, 5, 4, 70), 1), ((2, 33, 96), 3), ((1, 700), 7), ((9, 3), 1), ((0, 8), 1)]
)
def test_gated_norm(shape: tuple, groups: int, gated: bool, gate_first: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [shape, shape, shape, shape[-1:]] if gated else [shape, shape, shape[-1:]]
    dy, *leaves = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    results = []
    for operator, kind in ((definition, torch.float64), (gated_rms_norm, dtype)):
        given = [x.to(kind).requires_grad_() for x in leaves]
        with poisoned():
            y = operator(given[0], given[1] if gated else None, given[-1], 1e-5, groups, gate_first)
            results.append([y, *torch.autograd.grad(y, given, dy.to(kind))])
    if not results[0][0].numel():
        assert results[1][0].shape == shape
        assert not results[1][-1].any()
        return
    assert_near(results[1], results[0], 3e-6 if dtype == torch.float32 else 1.5e-2)


@pytest.mark.parametrize("weights", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5, 70), (1, 700), (9, 3), (0, 8)])
def test_norm_is_rounded_before_it_meets_the_weight(shape: tuple, weights: torch.dtype) -> None:
    """In float16: the interpreter cuts numbers off where a GPU rounds them to bfloat16."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator).half() for _ in range(2))
    weight = torch.randn(shape[-1], generator=generator).to(weights)
    results = []
    for backend in ("torch", "triton"):
        given = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        with poisoned():
            y = rms_norm(*given, 1e-6, backend)
            results.append([y, *torch.autograd.grad(y, given, dy)])
    assert [t.dtype for t in results[1]] == [torch.float16, torch.float16, weights]
    # PyTorch adds squares up in another order: an output may be rounded to its neighbour, no more.
    assert (results[0][0] != results[1][0]).sum() <= 0.01 * x.numel()
    if x.numel():
        assert_near(results[1], results[0], 2e-3)
