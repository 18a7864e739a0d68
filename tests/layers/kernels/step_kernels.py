"""The fused decode steps in Triton's interpreter against the float64 reference: outputs, all states, sizes that are
no powers of two, and scratch that begins as NaN."""

from __future__ import annotations

import pytest
import torch
from kernel_support import assert_near, poisoned
from torch import Tensor

from hybridvl.layers.errors import ConfigError
from hybridvl.layers.ops.gdn_step import gated_delta_net_step
from hybridvl.layers.ops.mamba2_step import mamba2_step


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def gdn_inputs(batch: int, key_heads: int, heads: int, K: int, V: int, width: int, gated: bool) -> list[Tensor | None]:
    keys, values = key_heads * K, heads * V
    return [
        draw(batch, keys, seed=1),
        draw(batch, keys, seed=2),
        draw(batch, values, seed=3),
        draw(batch, values, seed=4) if gated else None,
        draw(batch, heads, seed=5) * 4,
        draw(batch, heads, seed=6),
        draw(batch, heads, K, V, seed=7),
        draw(batch, keys, width, seed=8),
        draw(batch, keys, width, seed=9),
        draw(batch, values, width, seed=10),
        draw(keys, width, seed=11),
        draw(keys, width, seed=12),
        draw(values, width, seed=13),
        draw(heads, seed=14),
        draw(heads, seed=15),
        draw(V, seed=16),
    ]


def mamba_inputs(batch: int, groups: int, heads: int, P: int, N: int, width: int, biased: bool) -> list[Tensor | None]:
    inner = heads * P
    channels = inner + 2 * groups * N
    return [
        draw(batch, inner, seed=1),
        draw(batch, channels, seed=2),
        draw(batch, heads, seed=3) * 4,
        draw(batch, heads, P, N, seed=4),
        draw(batch, channels, width, seed=5),
        draw(channels, width, seed=6),
        draw(channels, seed=7) if biased else None,
        draw(heads, seed=8),
        draw(heads, seed=9),
        draw(heads, seed=10),
        draw(inner, seed=11),
    ]


def run(step, inputs: list[Tensor | None], states: slice, backend: str, dtype: torch.dtype, steps: int, **options):
    """Outputs of several steps and the states after them, float64."""
    given = [None if x is None else x.to(dtype, copy=True) for x in inputs]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    given[states.start] = given[states.start].to(wide)
    outputs = []
    for _ in range(steps):
        addresses = [x.data_ptr() for x in given[states]]
        outputs.append(step(*given, **options, backend=backend))
        assert addresses == [x.data_ptr() for x in given[states]]
        given[0], given[1] = given[0] + 0.25, given[1] - 0.125
    return [x.double() for x in (*outputs, *given[states])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "key_heads", "heads", "K", "V", "width", "gated", "negative"),
    [(2, 2, 2, 16, 32, 4, True, False), (1, 1, 3, 24, 70, 3, True, True), (3, 2, 4, 5, 7, 1, False, False)],
)
def test_gated_delta_net_step(
    batch: int, key_heads: int, heads: int, K: int, V: int, width: int, gated: bool, negative: bool, dtype: torch.dtype
) -> None:
    inputs = [
        None if x is None else x.to(dtype).double() for x in gdn_inputs(batch, key_heads, heads, K, V, width, gated)
    ]
    results = []
    for backend, kind in (("reference", torch.float64), ("triton", dtype)):
        with poisoned():
            results.append(
                run(
                    gated_delta_net_step,
                    inputs,
                    slice(6, 10),
                    backend,
                    kind,
                    3,
                    norm_eps=1e-5,
                    negative_eigenvalues=negative,
                )
            )
    assert_near(results[1], results[0], 2e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "groups", "heads", "P", "N", "width", "biased"),
    [(2, 1, 4, 16, 32, 4, True), (1, 2, 6, 40, 24, 3, False), (2, 3, 3, 5, 7, 2, True), (1, 1, 9, 64, 288, 4, True)],
)
def test_mamba2_step(
    batch: int, groups: int, heads: int, P: int, N: int, width: int, biased: bool, dtype: torch.dtype
) -> None:
    if N > 256:
        with pytest.raises(ConfigError, match="up to 256, not 288"):
            run(mamba2_step, mamba_inputs(batch, groups, heads, P, N, width, biased), slice(3, 5), "triton", dtype, 1)
        return
    inputs = [
        None if x is None else x.to(dtype).double() for x in mamba_inputs(batch, groups, heads, P, N, width, biased)
    ]
    results = []
    for backend, kind in (("reference", torch.float64), ("triton", dtype)):
        with poisoned():
            results.append(run(mamba2_step, inputs, slice(3, 5), backend, kind, 3, norm_eps=1e-5, groups=groups))
    assert_near(results[1], results[0], 2e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("log_decay", [-60.0, -1e4, 0.0])
def test_extreme_decays(log_decay: float) -> None:
    inputs = gdn_inputs(1, 1, 2, 16, 16, 4, True)
    inputs[13] = torch.full((2,), -log_decay if log_decay else 1e-30).log()
    inputs[4], inputs[14] = torch.full((1, 2), 1.0), torch.zeros(2)
    results = [
        run(gated_delta_net_step, inputs, slice(6, 10), backend, dtype, 2)
        for backend, dtype in (("reference", torch.float64), ("triton", torch.float32))
    ]
    assert_near(results[1], results[0], 1e-5)


def test_states_that_kernels_cannot_write_in_place_are_refused() -> None:
    inputs = gdn_inputs(1, 1, 1, 8, 8, 4, True)
    inputs[6] = inputs[6].mT
    with pytest.raises(ConfigError, match=r"recurrent has strides .* expected a contiguous tensor"):
        gated_delta_net_step(*(x.float() for x in inputs), backend="triton")
