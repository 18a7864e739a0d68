"""Stored cases of the operators, and comparisons shared by their tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "data" / "ops"
RAGGED = (1, 2, 4, 5, 31, 32, 33, 63, 64, 65, 75, 130)


@cache
def cases() -> dict[str, dict[str, Any]]:
    """Options of every stored case by name."""
    return json.loads((FOLDER / "cases.json").read_text())


@cache
def _arrays(file: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{file}.safetensors")


def arrays(file: str, case: str) -> dict[str, Tensor]:
    """The arrays "inputs" or "expected" of a case by short name."""
    return {name.removeprefix(f"{case}."): x for name, x in _arrays(file).items() if name.startswith(f"{case}.")}


def case_inputs(case: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor | None, dict[str, Tensor]]:
    """Inputs as leaves that require gradients, cu_seqlens, and the gradients of the outputs."""
    stored = arrays("inputs", case)
    cu_seqlens = stored.pop("cu_seqlens", None)
    upstream = {name: stored.pop(name).to(dtype) for name in ("do", "dy", "dfinal_state") if name in stored}
    leaves = {name: x.clone().to(dtype).requires_grad_() for name, x in stored.items()}
    return leaves, cu_seqlens, upstream


def relative(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    assert got.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    scale = max(float(expected.detach().double().abs().max()), 1e-30)
    return float((got.detach().double() - expected.detach().double()).abs().max()) / scale


def assert_close(
    got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, vanishing: tuple[str, ...] = ()
):
    """All of `expected` within `tolerance`, relative to max; those named `vanishing` absolutely."""
    assert got.keys() >= expected.keys()
    for name, value in expected.items():
        if name in vanishing:
            assert float(got[name].detach().double().abs().max()) < tolerance, name
        else:
            assert relative(got[name], value) < tolerance, name


def outputs_and_gradients(
    op: Callable[..., tuple[Tensor, Tensor]], inputs: dict[str, Tensor], seed: int = 0
) -> dict[str, Tensor]:
    """Output, final state, and the gradient of every tensor in `inputs` under fixed random gradients of both."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    output, final = op(**leaves)
    generator = torch.Generator().manual_seed(seed)
    loss = output.new_zeros((), dtype=torch.float64)
    for x in (output, final):
        loss = loss + (x.double() * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"output": output, "final": final} | {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}
