"""The kernels of frames in Triton's interpreter: rotary, slots of a cache, the short convolution, an MLP's gate."""

from __future__ import annotations

import pytest
import torch
from kernel_support import assert_near, poisoned
from torch import Tensor

from hybridvl.layers.errors import ConfigError
from hybridvl.layers.ops.causal_conv import causal_conv
from hybridvl.layers.ops.rotary import apply_rotary, rotary_table
from hybridvl.layers.ops.slots import store_in_slots
from hybridvl.layers.ops.swiglu import swiglu

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("dtype", "table"), [(F32, F32), (BF16, F32), (BF16, BF16), (F32, BF16)])
@pytest.mark.parametrize("shape", [(2, 5, 3, 20), (1, 1, 16, 128), (3, 7, 1, 2), (0, 4, 2, 8)])
def test_rotary(shape: tuple[int, ...], dtype: torch.dtype, table: torch.dtype) -> None:
    batch, tokens, heads, dim = shape
    # One of q, k and v that lie side by side, and one table for all rows: neither is dense.
    x = draw(batch, tokens, 3, heads, dim, dtype=dtype)[:, :, 1]
    cos, sin = (t.to(table) for t in rotary_table(torch.arange(tokens)[None] + 1000, dim))
    cos = cos + draw(1, tokens, dim, dtype=table, seed=1)  # halves that differ
    results = []
    for backend, kind in (("reference", torch.float64), ("triton", dtype)):
        given = x.to(kind).requires_grad_()
        with poisoned():
            y = apply_rotary(given, cos if backend == "triton" else cos.double(), sin.to(cos.dtype), backend)
            results.append([y, *torch.autograd.grad(y, given, draw(*shape, dtype=dtype, seed=2).to(kind))])
    if not results[0][0].numel():
        assert results[1][0].shape == shape
        return
    assert results[1][0].dtype == dtype
    assert_near(results[1], results[0], 3e-7 if (dtype, table) == (F32, F32) else 1e-2)


def test_rotary_rounds_as_pytorch_does() -> None:
    """In float16: the interpreter cuts numbers off where a GPU rounds them to bfloat16."""
    x, (cos, sin) = draw(2, 9, 4, 32, dtype=F16), rotary_table(torch.arange(9).expand(2, -1), 32)
    for table in (F32, F16):
        tables = cos.to(table), sin.to(table)
        assert torch.equal(apply_rotary(x, *tables, "triton"), apply_rotary(x, *tables, "torch"))


@pytest.mark.parametrize(
    ("tokens", "slots", "lengths", "counts"),
    [
        (1, 8, (7, 8), (1, 1)),
        (5, 8, (6, 0), (5, 2)),
        (20, 8, (3, 100), (20, 0)),
        (20, 8, (0, 11), (9, 8)),
        (0, 8, (1, 2), (0, 0)),
    ],
)
@pytest.mark.parametrize("dtype", [F32, F16])
def test_slots(tokens: int, slots: int, lengths: tuple[int, int], counts: tuple[int, int], dtype: torch.dtype) -> None:
    heads, K, V = 3, 20, 12
    k, v = (draw(2, tokens, heads, 2 * dim, dtype=F32)[..., ::2] for dim in (K, V))
    caches = []
    for backend in ("reference", "torch", "triton"):
        # As `zero_slots` lays them out: a head's slots in one piece.
        cache = [draw(2, heads, slots, dim, dtype=dtype, seed=3).transpose(1, 2) for dim in (K, V)]
        store_in_slots(k, v, *cache, torch.tensor(lengths), torch.tensor(counts), backend)
        caches.append(cache)
    for found in caches[1:]:
        for x, right in zip(found, caches[0], strict=True):
            assert torch.equal(x, right)


def test_slots_that_are_not_dense_are_refused() -> None:
    k, slots, one = draw(1, 2, 3, 4, dtype=F32), draw(1, 8, 3, 8, dtype=F32)[..., ::2], torch.tensor([1])
    with pytest.raises(
        ConfigError, match=r"^store_in_slots: slots_k has strides \(192, 24, 8, 2\), expected a last one"
    ):
        store_in_slots(k, k, slots, slots, one, one, "triton")


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("carried", [True, False])
@pytest.mark.parametrize(
    ("batch", "tokens", "channels", "width", "biased"),
    [
        (2, 33, 130, 4, True),
        (1, 40, 9, 20, False),
        (1, 2, 7, 4, False),
        (2, 1, 5, 3, True),
        (1, 16, 128, 1, False),
        (2, 0, 6, 4, False),
    ],
)
def test_conv(
    batch: int, tokens: int, channels: int, width: int, biased: bool, carried: bool, activation: str | None, dtype
) -> None:
    x, weight = draw(batch, tokens, channels, dtype=dtype), draw(channels, width, dtype=dtype, seed=1)
    bias = draw(channels, dtype=dtype, seed=2) if biased else None
    state = draw(batch, channels, width, dtype=dtype, seed=3) if carried else None
    wide = [None if t is None else t.double() for t in (x, weight, bias, state)]
    y, final = causal_conv(*wide, activation, backend="reference")
    with poisoned():
        found, kept = causal_conv(x, weight, bias, state, activation, backend="triton")
    assert found.dtype == kept.dtype == dtype
    assert torch.equal(kept.double(), final)
    if tokens:
        assert_near([found], [y], 1e-6 if dtype == F32 else 1e-2)
    assert found.shape == y.shape


@pytest.mark.parametrize("shape", [(1, 7), (3, 500), (2, 3, 400), (0, 8)])
def test_swiglu(shape: tuple[int, ...]) -> None:
    """In float16: the interpreter cuts numbers off where a GPU rounds them to bfloat16."""
    gate, up = draw(*shape, 2, dtype=F32).half().unbind(-1)
    with poisoned():
        found = swiglu(gate, up, "triton")
    assert torch.equal(found, (gate.double() * gate.double().sigmoid()).half() * up)
    wide = gate.float(), up.float()
    if found.numel():
        right = [x.double() for x in wide]
        assert_near([swiglu(*wide, "triton")], [swiglu(*right, "reference")], 3e-7)
