"""In which order samples are read: by number or from a stream, for ever or once, resumable at any sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from hybridvl.data.task import Source, StreamSource
from hybridvl.layers.errors import ConfigError


class Order(ABC):
    """A sequence of sample keys. It lives in the main process; workers turn its keys into samples."""

    @abstractmethod
    def __iter__(self) -> Iterator[Any]:
        """The keys from the loaded state on, or from the beginning."""

    @abstractmethod
    def state_dict(self, consumed: int) -> dict[str, Any]:
        """Plain values from which iteration goes on after the first `consumed` keys since the beginning of training."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> int:
        """Go on from a state; returns its `consumed`."""


class NumberOrder(Order):
    """Numbers of the samples of a `Source`: key (epoch, number).

    Args:
        size: samples in an epoch.
        seed: seed of the shuffling, which differs in every epoch.
        shuffle: whether to shuffle.
        endless: begin the next epoch after the last sample.
        rank, world: this process reads every world-th sample, beginning at its rank.
    """

    def __init__(
        self, size: int, *, seed: int = 0, shuffle: bool = False, endless: bool = False, rank: int = 0, world: int = 1
    ) -> None:
        self.size = size
        self.seed = seed
        self.shuffle = shuffle
        self.endless = endless
        self.rank = rank
        self.world = world
        self._consumed = 0

    @property
    def share(self) -> int:
        """Samples in an epoch of this process; all processes have the same number when it is endless."""
        return -(-(self.size - (0 if self.endless else self.rank)) // self.world)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, done = divmod(self._consumed, max(1, self.share))
        while True:
            numbers = self._numbers(epoch)
            for position in range(done, self.share):
                yield epoch, int(numbers[(self.rank + position * self.world) % self.size])
            if not self.endless:
                return
            epoch, done = epoch + 1, 0

    def state_dict(self, consumed: int) -> dict[str, Any]:
        return {"samples": consumed, "world": self.world}

    def load_state_dict(self, state: dict[str, Any]) -> int:
        # Another number of processes goes on where these had come to together.
        self._consumed = int(state["samples"]) * int(state["world"]) // self.world
        return self._consumed

    def _numbers(self, epoch: int) -> Any:
        if not self.shuffle:
            return range(self.size)
        return np.random.default_rng([self.seed, epoch]).permutation(self.size)


class StreamOrder(Order):
    """Rows of a `StreamSource`, shuffled within blocks so that any point can be returned to: key (number, row).

    Args:
        source: the stream.
        seed: seed of the shuffling.
        block: rows that are read and shuffled together; 1 keeps the stream's order.
        endless: begin the next epoch after the last row.
        rank, world: this process uses every world-th row, beginning at its rank.
    """

    def __init__(
        self,
        source: StreamSource,
        *,
        seed: int = 0,
        block: int = 1,
        endless: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.source = source
        self.seed = seed
        self.block = block
        self.endless = endless
        self.rank = rank
        self.world = world
        self._start: dict[str, Any] = {"samples": 0, "epoch": 0, "block": 0, "skip": 0, "stream": None}
        self._marks: deque[dict[str, Any]] = deque()

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        mark: dict[str, Any] = dict(self._start)
        self._marks.clear()
        skip = mark.pop("skip")
        while True:
            taken, whole = 0, mark["stream"] is None
            rows = self.source.rows(mark["epoch"], mark["stream"])
            while block := list(islice(rows, self.block * self.world)):
                self._marks.append(dict(mark))
                mine = self._shuffled(block, mark["epoch"], mark["block"])
                yield from enumerate(mine[skip:], mark["samples"] + skip)
                taken += len(mine)
                mark["samples"] += len(mine)
                mark["block"] += 1
                mark["stream"] = self.source.state_dict()
                skip = 0
            if whole and not taken:
                raise ConfigError("data.task: the stream is empty; expected at least one sample for each process")
            if not self.endless:
                return
            mark |= {"epoch": mark["epoch"] + 1, "block": 0, "stream": None}

    def state_dict(self, consumed: int) -> dict[str, Any]:
        while len(self._marks) > 1 and self._marks[1]["samples"] <= consumed:
            self._marks.popleft()
        if not self._marks:
            return dict(self._start)
        mark = self._marks[0]
        return {**mark, "skip": consumed - mark["samples"]}

    def load_state_dict(self, state: dict[str, Any]) -> int:
        self._start = dict(state)
        self._marks.clear()
        return int(state["samples"]) + int(state["skip"])

    def _shuffled(self, block: list[Any], epoch: int, number: int) -> list[Any]:
        if self.endless and self.world > 1:
            # Every process must take the same number of steps.
            block = block[: len(block) // self.world * self.world]
        if self.block > 1:
            order = np.random.default_rng([self.seed, epoch, number]).permutation(len(block))
            block = [block[place] for place in order]
        return block[self.rank :: self.world]


def make_order(
    source: Source | StreamSource, *, seed: int, training: bool, block: int, rank: int = 0, world: int = 1
) -> Order:
    """The order for training (endless, shuffled) or evaluation (once, as it stands)."""
    if isinstance(source, StreamSource):
        size = block if training else 1
        return StreamOrder(source, seed=seed, block=size, endless=training, rank=rank, world=world)
    return NumberOrder(len(source), seed=seed, shuffle=training, endless=training, rank=rank, world=world)
