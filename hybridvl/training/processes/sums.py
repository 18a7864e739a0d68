"""Sums and collections over the processes of a run; with one process they are what went in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, distributed

from hybridvl.data.processes import gathered as gathered
from hybridvl.data.processes import process_rank as process_rank
from hybridvl.data.processes import processes as processes
from hybridvl.data.processes import started


def summed(values: Tensor) -> Tensor:
    """The sum of `values` over all processes, which must all call this; a new tensor of the same shape and dtype."""
    total = values.detach().clone()
    if started():
        distributed.all_reduce(total)
    return total


def summed_counts(counts: Mapping[str, int]) -> dict[str, int]:
    """Counts added up by name over all processes, which may know different names; all of them must call this."""
    total: Counter[str] = Counter()
    for own in gathered(dict(counts)):
        total.update(own)
    return dict(total)


class Means:
    """Means over the batches of a pass and over all processes.

    Lightning's own (`sync_dist` with a `batch_size`) rounds the average number of tokens of a process down.

    Args:
        names: of what is averaged.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._sums: list[Tensor] = []  # (2, N) of each batch: sums, and what they are sums over

    def clear(self) -> None:
        """Forget everything."""
        self._sums.clear()

    def add(self, means: Tensor, counts: Sequence[int]) -> None:
        """Means (N,) over one batch, each over a number of tokens or answers."""
        weights = torch.tensor(counts, dtype=torch.float64, device=means.device)
        self._sums.append(torch.stack((means.detach().double() * weights, weights)))

    def over_all_processes(self, device: torch.device) -> dict[str, Tensor]:
        """The means, float64, of what has been counted anywhere; all processes must call this."""
        nothing = torch.zeros(2, len(self.names), dtype=torch.float64, device=device)
        sums, counts = summed(torch.stack([nothing, *self._sums]).sum(0))
        means = sums / counts.clamp_min(1)
        return {name: means[number] for number, name in enumerate(self.names) if counts[number]}
