"""What the tests of Triton kernels share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New floating-point buffers begin as NaN, so that what a kernel forgets to write shows."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like"):
            original = getattr(torch, name)

            def fill(*sizes, original=original, **options) -> Tensor:
                x = original(*sizes, **options)
                return x.fill_(math.nan) if x.is_floating_point() else x.fill_(-(2**31) + 1)

            patch.setattr(torch, name, fill)
        yield


def assert_near(found: list[Tensor], right: list[Tensor], tolerance: float) -> None:
    """Every tensor, by its largest difference relative to the largest right value."""
    assert len(found) == len(right)
    for index, (x, y) in enumerate(zip(found, right, strict=True)):
        assert x.shape == y.shape, index
        error = ((x.double() - y.double()).abs().max() / y.abs().max().clamp(min=1e-30)).item()
        assert error <= tolerance, f"tensor {index}: error {error:.1e} over {tolerance:.1e}"
