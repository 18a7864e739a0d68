"""Sums and collections over the processes of a run; with one process they are what went in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, distributed


def processes() -> int:
    """Processes of this run."""
    return distributed.get_world_size() if _started() else 1


def process_rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if _started() else 0


def summed(values: Tensor) -> Tensor:
    """The sum of `values` over all processes, which must all call this; a new tensor of the same shape and dtype."""
    total = values.detach().clone()
    if _started():
        distributed.all_reduce(total)
    return total


def gathered(value: Any) -> list[Any]:
    """The plain values of all processes by rank; all of them must call this."""
    if not _started():
        return [value]
    values: list[Any] = [None] * processes()
    distributed.all_gather_object(values, value)
    return values


def summed_counts(counts: Mapping[str, int]) -> dict[str, int]:
    """Counts added up by name over all processes, which may know different names; all of them must call this."""
    total: Counter[str] = Counter()
    for own in gathered(dict(counts)):
        total.update(own)
    return dict(total)


def _started() -> bool:
    return distributed.is_available() and distributed.is_initialized()
