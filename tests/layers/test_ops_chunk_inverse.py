"""Inverses of small unit lower triangular matrices against torch.linalg, in buffers that are used again."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridvl.layers.ops.chunk_inverse import UnitLowerInverse
from hybridvl.layers.ops.chunk_layout import Workspace


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([2, 4, 8, 16, 32, 64]), st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(0, 99))
def test_inverses_of_what_stands_in_the_buffer(size: int, counts: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    work = Workspace(torch.float64, torch.device("cpu"))
    for count in counts:  # smaller ones share the buffers of larger ones
        matrices = torch.empty(count, size, size, dtype=torch.float64)
        inverse = UnitLowerInverse(matrices, work)
        for _ in range(2):
            matrices.copy_(torch.randn(count, size, size) / size)  # also above the diagonal, which must not be read
            expected = torch.linalg.inv(torch.eye(size, dtype=torch.float64) - matrices.tril(-1))
            got = inverse.solve()
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
            assert not got.triu(1).any()
