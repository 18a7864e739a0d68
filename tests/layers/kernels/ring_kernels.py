"""Attention to a ring and to a cache in Triton's interpreter against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from kernel_support import assert_near, poisoned
from torch import Tensor

from hybridvl.layers.ops.kernels.triton_ring_attention import _attend
from hybridvl.layers.ops.ring_attention import cached_attention, ring_attention


def draw(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def tensors(batch: int, tokens: int, slots: int, heads: int, kv_heads: int, K: int, V: int, dtype: torch.dtype):
    return (
        draw(batch, tokens, heads, K, dtype=dtype, seed=1),
        draw(batch, tokens, kv_heads, K, dtype=dtype, seed=2),
        draw(batch, tokens, kv_heads, V, dtype=dtype, seed=3),
        draw(batch, slots, kv_heads, K, dtype=dtype, seed=4),
        draw(batch, slots, kv_heads, V, dtype=dtype, seed=5),
    )


SIZES = [
    # tokens, slots, heads, kv heads, K, V, lengths
    (1, 40, 4, 2, 16, 16, (0, 17)),
    (5, 37, 6, 2, 20, 12, (100, 37)),
    (33, 70, 2, 1, 16, 24, (70, 3)),
    (40, 16, 2, 2, 8, 8, (1000, 11)),
    (70, 69, 3, 1, 16, 16, (35, 68)),
    (3, 1, 2, 2, 16, 16, (5, 0)),
]


@pytest.mark.parametrize(("dtype", "splits"), [(torch.float32, 1), (torch.bfloat16, 3)])
@pytest.mark.parametrize(("tokens", "slots", "heads", "kv_heads", "K", "V", "lengths"), SIZES)
def test_ring(
    tokens: int, slots: int, heads: int, kv_heads: int, K: int, V: int, lengths: tuple[int, int], splits: int, dtype
) -> None:
    q, k, v, ring_k, ring_v = tensors(2, tokens, slots, heads, kv_heads, K, V, dtype)
    length = torch.tensor(lengths)
    right = ring_attention(*(x.double() for x in (q, k, v, ring_k, ring_v)), length, backend="reference")
    # What no token has been written into is never read.
    for row, seen in enumerate(lengths):
        ring_k[row, seen:], ring_v[row, seen:] = torch.nan, torch.nan
    with poisoned():
        found = _attend(q, k, v, ring_k, ring_v, length, None, splits)
    assert found.dtype == dtype
    assert_near([found], [right], 2e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(("dtype", "splits"), [(torch.float32, 4), (torch.bfloat16, 1)])
@pytest.mark.parametrize(
    ("tokens", "slots", "lengths"), [(1, 40, (0, 17)), (1, 33, (33, 500)), (7, 80, (73, 20)), (20, 41, (1, 0))]
)
def test_cache(tokens: int, slots: int, lengths: tuple[int, int], splits: int, dtype: torch.dtype) -> None:
    q, _, _, k, v = tensors(2, tokens, 2 * slots, 4, 2, 20, 24, dtype)
    k, v, length = k[:, :slots], v[:, :slots], torch.tensor(lengths)
    right = cached_attention(q.double(), k.double(), v.double(), length, scale=0.3, backend="reference")
    with poisoned():
        found = _attend(q, None, None, k, v, length, 0.3, splits)
    assert_near([found], [right], 2e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("tokens", [1, 6])
def test_the_operators_reach_the_kernels(tokens: int) -> None:
    q, k, v, ring_k, ring_v = tensors(2, tokens, 48, 4, 2, 16, 16, torch.float32)
    length = torch.tensor([12, 300])
    for operator, given in (
        (ring_attention, (q, k, v, ring_k, ring_v, length)),
        (cached_attention, (q, ring_k, ring_v, length)),
    ):
        with poisoned():
            found = operator(*given, backend="triton")
        assert_near([found], [operator(*given, backend="reference")], 2e-6)
