"""What a task is: named splits, each of which gives samples by number."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, TypedDict

import numpy as np

from hybridvl.layers.errors import ConfigError

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class Sample(TypedDict, total=False):
    """One conversation: its messages and, where accuracies are to be sliced, the kind of each answer."""

    messages: list[dict[str, Any]]
    kinds: list[str]


class Source(ABC):
    """The samples of one split, by number."""

    @abstractmethod
    def __len__(self) -> int:
        """Samples in one epoch."""

    @abstractmethod
    def sample(self, index: int, epoch: int) -> Sample:
        """Sample `index` of an epoch; the same arguments give the same sample in every process."""

    def place(self, index: int) -> str:
        """Where sample `index` stands, for messages."""
        return f"sample {index}"


class StreamSource(ABC):
    """The samples of one split in the order in which they are read, without random access."""

    @abstractmethod
    def rows(self, epoch: int, state: dict[str, Any] | None) -> Iterator[Any]:
        """The raw rows of one epoch, from its beginning or from where `state` was taken."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Where the iterator that `rows` returned last stands now."""

    @abstractmethod
    def decode(self, row: Any) -> Sample:
        """The sample of one raw row; called in a worker process."""


class Task(ABC):
    """Where samples come from; in YAML `data.task` with `class_path` and `init_args`."""

    @abstractmethod
    def source(self, split: Split, seed: int) -> Source | StreamSource:
        """The samples of a split; raises ConfigError when there are none."""


def require_split(split: str) -> None:
    """Raise ConfigError unless `split` is one of train, val and test."""
    if split not in SPLITS:
        raise ConfigError(f"split {split!r}; expected one of {', '.join(SPLITS)}")


def require_span(place: str, span: int | tuple[int, int], most: int) -> tuple[int, int]:
    """Two numbers, or one for both, of which neither is below 1 or above `most`; ConfigError, at `place`, otherwise."""
    low, high = (span, span) if isinstance(span, int) else span
    if not 1 <= low <= high <= most:
        shown = span if isinstance(span, int) else list(span)
        raise ConfigError(f"{place}: {shown}; expected two numbers, 1 <= fewest <= most <= {most}")
    return low, high


def sample_rng(seed: int, split: Split, index: int, epoch: int) -> np.random.Generator:
    """The generator of one sample, the same in every process; that of an evaluation sample in every epoch, too."""
    key = [seed, SPLITS.index(split), epoch if split == "train" else 0, index]
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence(key)))


def kind_weights(kinds: Mapping[str, float], known: Collection[str]) -> dict[str, float]:
    """The weights of the kinds of questions that are asked at all; a ConfigError names what is not a kind or weight."""
    unknown = sorted(set(kinds) - set(known))
    if unknown:
        raise ConfigError(f"data.task.kinds: {', '.join(unknown)}; known are {', '.join(known)}")
    if any(weight < 0 for weight in kinds.values()) or not sum(kinds.values()) > 0:
        raise ConfigError(f"data.task.kinds: {dict(kinds)}; expected weights of at least 0, one of them above 0")
    return {kind: weight for kind, weight in kinds.items() if weight > 0}
