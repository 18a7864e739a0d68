"""Weights counted as they are handed over: each of the source's is copied once, then repeated, or left."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Ledger:
    """Which elements of the source's tensors have found a place.

    shapes: of all the source's tensors, by name.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self._used: dict[str, Tensor] = {}  # element by element, for tensors that were taken in part
        self._whole: set[str] = set()

    def take(self, name: str, axis: int, indices: Sequence[int]) -> int:
        """Take rows (axis 0) or columns of a tensor; returns how many elements are taken for the first time."""
        if name in self._whole:
            return 0
        shape = self._shapes[name]
        if axis == 0 and len(indices) == (*shape, 1)[0] and name not in self._used and _in_order(indices):
            self._whole.add(name)
            return math.prod(shape)
        used = self._used.setdefault(name, torch.zeros(shape, dtype=torch.bool))
        before = int(used.sum())
        used.index_fill_(axis, torch.as_tensor(indices), True)
        after = int(used.sum())
        if after == used.numel():
            self._whole.add(name)
            del self._used[name]
        return after - before

    def take_all(self, name: str) -> int:
        """Take a whole tensor; returns how many elements are taken for the first time."""
        left = self.left(name)
        self._whole.add(name)
        self._used.pop(name, None)
        return left

    def left(self, name: str) -> int:
        """How many elements of a tensor have no place so far."""
        if name in self._whole:
            return 0
        used = self._used.get(name)
        return math.prod(self._shapes[name]) - (0 if used is None else int(used.sum()))


def runs(into: Sequence[int], taken: Sequence[int]) -> list[tuple[int, int, int]]:
    """Index pairs as (first in the target, first in the source, length) of their consecutive runs."""
    found: list[tuple[int, int, int]] = []
    for here, there in zip(into, taken, strict=True):
        if found and (here, there) == (found[-1][0] + found[-1][2], found[-1][1] + found[-1][2]):
            found[-1] = (*found[-1][:2], found[-1][2] + 1)
        else:
            found.append((here, there, 1))
    return found


def _in_order(indices: Sequence[int]) -> bool:
    return indices == range(len(indices)) or list(indices) == list(range(len(indices)))
