"""Products of a single row with weights, at the speed of memory: what decoding one sequence on a CPU is made of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor


def one_row_products(x: Tensor) -> AbstractContextManager[None]:
    """A context for layers that x (..., D) goes through, if it is one bfloat16 row on a CPU; elsewhere it does nothing.

    There `torch.nn.functional.linear` hands bfloat16 to oneDNN, whose products take twice as long for one row as
    PyTorch's own; for more rows they are the faster ones.
    """
    if torch.compiler.is_compiling() or x.dtype != torch.bfloat16 or x.device.type != "cpu" or x.numel() != x.shape[-1]:
        return nullcontext()
    return _without_onednn()


@contextmanager
def _without_onednn() -> Iterator[None]:
    enabled = torch.backends.mkldnn.set_flags(_enabled=False, _fp32_precision=None)[0]
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=enabled, _fp32_precision=None)
