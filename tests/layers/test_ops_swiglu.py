"""SwiGLU's gate in blocks: the plain expression, forward and backward, ragged ends included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hybridvl.layers.ops.swiglu import swiglu


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 50), (10,)], ids=str)
def test_blocks_equal_the_expression(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybridvl.layers.ops.swiglu._BLOCK", 10)
    monkeypatch.setattr("hybridvl.layers.ops.swiglu._FRESH", 10)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan")))
    torch.manual_seed(0)
    gate, up, dy = (torch.randn(shape).to(dtype) for _ in range(3))

    def run(expression) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
        leaves = [x.clone().requires_grad_() for x in (gate, up)]
        y = expression(*leaves)
        return y, *torch.autograd.grad(y, leaves, dy)

    for own, plain in zip(run(swiglu), run(lambda gate, up: F.silu(gate) * up), strict=True):
        assert own.dtype == dtype
        torch.testing.assert_close(own, plain, rtol=1e-2 if dtype == torch.bfloat16 else 2e-6, atol=1e-6)


def test_strided_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridvl.layers.ops.swiglu._BLOCK", 4)
    both = torch.randn(6, 10, dtype=torch.float64, requires_grad=True)
    gate, up = both.chunk(2, dim=-1)
    (gradient,) = torch.autograd.grad(swiglu(gate, up).square().sum(), both)
    (expected,) = torch.autograd.grad((F.silu(gate) * up).square().sum(), both)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)
