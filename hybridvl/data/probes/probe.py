"""What every probe is: samples drawn by number, questions with one right answer each, and how far guessing gets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from statistics import fmean
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from hybridvl.data.task import Sample, Source, Split, Task, require_split, sample_rng
from hybridvl.layers.errors import ConfigError

Drawn = TypeVar("Drawn")


class Asked(NamedTuple):
    """A question about what was shown.

    kind: the slice that its answer counts in. chance: how often a guess by one who has not seen the sample is right.
    """

    question: str
    answer: str
    kind: str
    chance: float


class Probe(Task, Generic[Drawn]):
    """A task whose samples are drawn, then shown, then asked about, each determined by (seed, split, epoch, number).

    Training samples never repeat; validation and test samples are the same in every epoch.

    Args:
        counts: training, validation and test samples in an epoch.
        unit: what they are called in the names of settings.
        sizes: further settings, by name, that are to be at least 1.
    """

    def __init__(self, counts: tuple[int, int, int], unit: str, sizes: Mapping[str, int]) -> None:
        self.counts: dict[Split, int] = dict(zip(("train", "val", "test"), counts, strict=True))
        for name, value in {**sizes, **{f"{split}_{unit}": count for split, count in self.counts.items()}}.items():
            if value < 1:
                raise ConfigError(f"data.task.{name}: {value}; expected at least 1")

    def source(self, split: Split, seed: int) -> ProbeSource[Drawn]:
        """The samples of a split."""
        require_split(split)
        return ProbeSource(self, split, seed)

    def chances(self, split: Split = "test", seed: int = 0) -> dict[str, float]:
        """Accuracy that guessing is expected to have on the first epoch of a split, by kind, and under "" in all."""
        found: dict[str, list[float]] = {}
        for asked in self.questions(split, seed):
            for kind in ("", asked.kind):
                found.setdefault(kind, []).append(asked.chance)
        return {kind: fmean(chances) for kind, chances in sorted(found.items())}

    def questions(self, split: Split = "test", seed: int = 0) -> list[Asked]:
        """Every question of the first epoch of a split."""
        source = self.source(split, seed)
        return [asked for index in range(len(source)) for asked in self.ask(source.drawn(index))]

    @abstractmethod
    def draw(self, rng: np.random.Generator, split: Split) -> Drawn:
        """What one sample holds."""

    @abstractmethod
    def show(self, drawn: Drawn, rng: np.random.Generator, split: Split) -> list[dict[str, Any]]:
        """The parts of the first message that come before the first question."""

    @abstractmethod
    def ask(self, drawn: Drawn) -> list[Asked]:
        """The questions about it, in order; at least one."""


class ProbeSource(Source, Generic[Drawn]):
    """The samples of one split of a probe."""

    def __init__(self, task: Probe[Drawn], split: Split, seed: int) -> None:
        self.task = task
        self.split = split
        self.seed = seed

    def __len__(self) -> int:
        return self.task.counts[self.split]

    def sample(self, index: int, epoch: int) -> Sample:
        """Sample `index` with its questions; evaluation samples are the same in every epoch."""
        rng = sample_rng(self.seed, self.split, index, epoch)
        drawn = self.task.draw(rng, self.split)
        parts = self.task.show(drawn, rng, self.split)
        messages: list[dict[str, Any]] = []
        kinds = []
        for asked in self.task.ask(drawn):
            messages.append({"role": "user", "content": [*parts, {"type": "text", "text": asked.question}]})
            messages.append({"role": "assistant", "content": asked.answer})
            kinds.append(asked.kind)
            parts = []
        return {"messages": messages, "kinds": kinds}

    def drawn(self, index: int, epoch: int = 0) -> Drawn:
        """What sample `index` holds."""
        return self.task.draw(sample_rng(self.seed, self.split, index, epoch), self.split)
