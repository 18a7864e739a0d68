"""RMS norms, plain and gated, against definitions in float64: outputs and every gradient, blocks with ragged ends."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from hybridvl.layers.errors import ConfigError
from hybridvl.layers.norms import GatedRMSNorm, RMSNorm
from hybridvl.layers.ops import blocked_norm
from hybridvl.layers.ops.gated_norm import gated_rms_norm, rms_norm

SHAPES = {"one row": (1, 6), "rows": (3, 5, 12), "many": (7, 23, 4, 6), "none": (0, 6), "vector": (18,)}


def definition(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, groups: int, gate_first: bool) -> Tensor:
    opening = torch.ones_like(x) if gate is None else gate / (1 + (-gate).exp())
    y = (x * opening if gate_first else x).unflatten(-1, (groups, -1))
    y = (y / (y.pow(2).mean(-1, keepdim=True) + eps).sqrt()).flatten(-2) * weight
    return y if gate_first else y * opening


def inputs(shape: tuple[int, ...], gated: bool, seed: int = 0) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    x, gate, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    weight = torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    return {"x": x, "gate": gate if gated else None, "weight": weight, "dy": dy}


def results(norm, given: dict[str, Tensor | None], dtype: torch.dtype, *options: object) -> dict[str, Tensor]:
    leaves = {
        name: None if t is None else t.to(dtype, copy=True).requires_grad_()
        for name, t in given.items()
        if name != "dy"
    }
    upstream = given["dy"]
    assert upstream is not None
    y = norm(leaves["x"], leaves["gate"], leaves["weight"], 1e-5, *options)
    known = {name: t for name, t in leaves.items() if t is not None}
    gradients = torch.autograd.grad(y, list(known.values()), upstream.to(dtype))
    return {"y": y} | {f"d{name}": gradient for name, gradient in zip(known, gradients, strict=True)}


@pytest.fixture(params=[1, 40, 1 << 18], ids=lambda block: f"blocks of {block}")
def _block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of single rows, of some rows with a ragged end, and one of everything, whatever the size of the input."""
    monkeypatch.setattr(blocked_norm, "BLOCK", request.param)
    monkeypatch.setattr("hybridvl.layers.ops.gated_norm.BLOCK", min(request.param, 41))
    empty = torch.empty

    def poisoned(*size, **options) -> Tensor:  # type: ignore[no-untyped-def]
        return empty(*size, **options).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.usefixtures("_block")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6), (torch.bfloat16, 0.03)]
)
@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_definition(
    shape: tuple[int, ...], groups: int, gated: bool, gate_first: bool, dtype: torch.dtype, tolerance: float
) -> None:
    given = inputs(shape, gated)
    expected = results(definition, given, torch.float64, groups, gate_first)
    for backend in ("torch", "reference"):
        got = results(gated_rms_norm, given, dtype, groups, gate_first, backend)
        for name, value in expected.items():
            assert got[name].dtype == dtype
            scale = value.detach().abs().amax() if value.numel() else torch.tensor(1.0)
            torch.testing.assert_close(got[name].double(), value, rtol=0, atol=tolerance * float(scale), msg=name)


@pytest.mark.usefixtures("_block")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_plain_norm_rounds_before_the_weight(dtype: torch.dtype) -> None:
    given = inputs((9, 7, 8), False)
    expected = results(definition, given, torch.float64, 1, False)
    got = results(lambda x, _, weight, eps: rms_norm(x, weight, eps), given, dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 0.02}[dtype]
    for name, value in expected.items():
        assert (got[name].double() - value).abs().max() <= tolerance * value.abs().max(), name
    x, weight = given["x"], given["weight"]
    assert x is not None
    assert weight is not None
    wide = x.to(dtype).to(torch.promote_types(dtype, torch.float32))
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(dtype)
    torch.testing.assert_close(
        got["y"], weight.to(dtype) * normed, rtol=1e-2 if dtype == torch.bfloat16 else 2e-6, atol=0
    )


@pytest.mark.usefixtures("_block")
def test_weights_of_other_dtypes_and_frozen_inputs() -> None:
    """float32 weights on bfloat16 inputs, as under autocast; inputs that need no gradient get none."""
    x, gate = torch.randn(30, 8).bfloat16(), torch.randn(30, 8).bfloat16().requires_grad_()
    for norm in (GatedRMSNorm(8, 1e-5), RMSNorm(8)):
        y = norm(x, gate) if isinstance(norm, GatedRMSNorm) else norm(x)
        assert y.dtype == torch.bfloat16
        y.sum().backward()
        assert norm.weight.grad is not None
        assert norm.weight.grad.dtype == torch.float32
    assert gate.grad is not None
    assert gate.grad.dtype == torch.bfloat16
    assert x.grad is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5)}, "x has shape (2, 5), expected (..., width) with width = 6"),
        ({"gate": torch.zeros(3, 6)}, "gate has shape (3, 6)"),
        ({"groups": 4}, "groups is 4, expected a divisor of the width 6"),
        ({"weight": torch.zeros(6, dtype=torch.int64)}, "weight has dtype torch.int64"),
    ],
)
def test_misshapen_arguments(change: dict[str, object], message: str) -> None:
    given: dict[str, object] = {"x": torch.zeros(2, 6), "gate": None, "weight": torch.zeros(6), "eps": 1e-5} | change
    with pytest.raises(ConfigError, match=re.escape(message)):
        gated_rms_norm(**given)  # type: ignore[arg-type]
