"""Several tasks as one: every epoch holds samples of each in proportion to its weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hybridvl.data.task import Sample, Source, Split, Task, require_split
from hybridvl.layers.errors import ConfigError, within

_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Part:
    """A task and its weight in a mixture."""

    task: Task
    weight: float = 1.0


class Mixture(Task):
    """Tasks mixed by weight.

    An epoch has `samples` training samples, of each part as many as its weight says. Those of one part are all
    different until every sample of it has been taken, over epochs too: a small part is repeated, of a large one each
    epoch takes others. Validation and testing take the samples of all parts, whatever the weights; where a part does
    not say the kind of its answers, its name is their kind, so that there is an accuracy for each part.

    Args:
        parts: tasks and their weights, by a name for each. Data sets that are streamed cannot be mixed.
        samples: training samples in an epoch.
    """

    def __init__(self, parts: dict[str, Part], samples: int) -> None:
        if not parts:
            raise ConfigError("data.task.parts: none; expected at least one")
        for name, part in parts.items():
            if not 0 < part.weight < math.inf:
                raise ConfigError(f"data.task.parts.{name}.weight: {part.weight!r}; expected a finite number above 0")
        if samples < len(parts):
            raise ConfigError(f"data.task.samples: {samples}; expected at least one for each of the {len(parts)} parts")
        self.parts = dict(parts)
        self.samples = samples

    def source(self, split: Split, seed: int) -> MixedSource:
        """The samples of a split; ConfigErrors begin with the part."""
        require_split(split)
        sources: dict[str, Source] = {}
        for name, part in self.parts.items():
            with within(f"part {name}"):
                source = part.task.source(split, seed)
                if not isinstance(source, Source):
                    raise ConfigError("data.task.streaming: true; expected false, a mixture takes samples by number")
                if not len(source):
                    raise ConfigError("no samples; expected at least one")
            sources[name] = source
        if split == "train":
            counts = shares({name: part.weight for name, part in self.parts.items()}, self.samples)
            return MixedSource(sources, counts, seed, repeats=True)
        return MixedSource(sources, {name: len(source) for name, source in sources.items()}, seed, repeats=False)


class MixedSource(Source):
    """The samples of several sources, so many of each.

    repeats: whether epochs differ, and go on where the one before has ended in each source, which then are spread over
    the numbers; otherwise they follow one another.
    """

    def __init__(self, sources: Mapping[str, Source], counts: Mapping[str, int], seed: int, repeats: bool) -> None:
        self._names = list(sources)
        self._sources = list(sources.values())
        self._counts = [counts[name] for name in self._names]
        self._ends = np.cumsum(self._counts)
        self._seed = seed
        self._repeats = repeats

    def __len__(self) -> int:
        return int(self._ends[-1])

    def sample(self, index: int, epoch: int) -> Sample:
        """Sample `index` of an epoch."""
        part, round, number = self._find(index, epoch)
        sample = self._sources[part].sample(number, round)
        if not self._repeats and "kinds" not in sample:
            answers = sum(message["role"] == "assistant" for message in sample["messages"])
            sample["kinds"] = [self._names[part]] * answers
        return sample

    def place(self, index: int) -> str:
        """The part, and the sample's place in it in the first epoch."""
        part, _, number = self._find(index, 0)
        return f"part {self._names[part]}, {self._sources[part].place(number)}"

    def _find(self, index: int, epoch: int) -> tuple[int, int, int]:
        """The part, how often all of it has been taken before, and the number in it."""
        if self._repeats:
            index = scattered(index, len(self), self._seed)  # the first samples are a mixture too
        part = int(np.searchsorted(self._ends, index, side="right"))
        position = index - (int(self._ends[part - 1]) if part else 0)
        if not self._repeats:
            return part, epoch, position
        size = len(self._sources[part])
        round, within_round = divmod(epoch * self._counts[part] + position, size)
        return part, round, scattered(within_round, size, self._seed + round)


def shares(weights: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole numbers that add up to `total`, in proportion to weights (largest remainders), but at least 1 each."""
    whole = sum(weights.values())
    exact = {name: total * weight / whole for name, weight in weights.items()}
    counts = {name: max(1, int(share)) for name, share in exact.items()}
    while (missing := total - sum(counts.values())) != 0:
        change = 1 if missing > 0 else -1
        able = [name for name in weights if counts[name] + change >= 1]
        counts[max(able, key=lambda name: change * (exact[name] - counts[name]))] += change
    return counts


def scattered(position: int, size: int, seed: int) -> int:
    """Number `position` of an order of 0 .. size - 1 that any beginning of is spread over all of them."""
    step = max(1, round(size * _GOLDEN))
    while math.gcd(step, size) != 1:
        step += 1
    start = int(np.random.SeedSequence(seed % 2**64).generate_state(1, np.uint64)[0] % np.uint64(size))
    return (start + step * position) % size
