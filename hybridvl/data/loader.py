"""Loaders: batches made in worker processes, the same ones however many workers there are, resumable exactly."""

from __future__ import annotations

import ctypes
import gc
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from hybridvl.data.collate import Batch, Collator
from hybridvl.data.encode import Example, SampleEncoder, TooLong
from hybridvl.data.order import NumberOrder, Order
from hybridvl.data.processes import gathered, process_rank, processes
from hybridvl.data.task import Source, StreamSource
from hybridvl.layers.errors import ConfigError

PACKING_CHUNK = 8
"""Examples that a worker makes at a time when the main process puts them together."""

_HOPELESS = 10_000  # samples of a stream that are too long, one after the other

_PR_SET_PDEATHSIG = 1  # of Linux's prctl


@dataclass(frozen=True)
class _Failure:
    """A ConfigError on its way from a worker to the main process, where its message is shown as it is.

    skipped: the sample is left out, and the message only tells why.
    """

    message: str
    skipped: bool = False


@dataclass(frozen=True)
class LoaderConfig:
    """How batches are made.

    Attributes:
        batch_size: samples in a padded batch; None: as many as the tokens allow.
        tokens: tokens in a batch at most, padding counted, where samples are packed or batch_size is None.
        packing: pack samples into one row instead of padding them.
        workers: worker processes; 0 makes batches in the main process.
        skip_long: leave out samples that do not fit the context.
    """

    batch_size: int | None
    tokens: int
    packing: bool
    workers: int
    skip_long: bool = False

    @property
    def fixed_size(self) -> int | None:
        """The number of samples in every batch; None if it is not known before they are made."""
        return None if self.packing or self.skip_long else self.batch_size

    def fits(self, examples: Sequence[Example], further: Example) -> bool:
        """Whether a further example fits into a batch."""
        if self.packing:
            return sum(map(len, examples)) + len(further) <= self.tokens
        if self.batch_size is not None:
            return len(examples) < self.batch_size
        return (len(examples) + 1) * max(map(len, (*examples, further))) <= self.tokens


class Made(NamedTuple):
    """A batch, how many samples were read for it, and how many of those were skipped."""

    batch: Batch
    samples: int
    skipped: int


class BatchStream:
    """Batches of one order of one source."""

    def __init__(
        self, source: Source | StreamSource, order: Order, encoder: SampleEncoder, config: LoaderConfig, name: str
    ) -> None:
        self.order = order
        self.config = config
        merge_size = encoder.images.config.merge_size
        self._collator = Collator(encoder.chat, merge_size, packing=config.packing, videos=encoder.videos.config)
        self._dataset = _Encoded(source, encoder, name, config.skip_long)
        self._loader: DataLoader[Any] | None = None
        self._told = False

    def __iter__(self) -> Iterator[Made]:
        try:
            yield from self._assembled() if self.config.fixed_size is None else self._whole()
        except ConfigError:
            self.close()
            raise

    def close(self) -> None:
        """End the workers; iterating again starts new ones."""
        # Dropped here and not left to the garbage collector, which takes queues and workers apart in any order and then
        # waits for workers that were never told to end.
        self._loader = None

    def _whole(self) -> Iterator[Made]:
        for made in self._made():
            batch = _checked(made)
            yield Made(batch, len(batch["input_ids"]), 0)

    def _assembled(self) -> Iterator[Made]:
        examples: list[Example] = []
        skipped = in_a_row = 0
        for chunk in self._made():
            for example in map(_checked, chunk):
                if isinstance(example, _Failure):
                    skipped, in_a_row = skipped + 1, in_a_row + 1
                    self._tell(example, in_a_row)
                    continue
                in_a_row = 0
                if examples and not self.config.fits(examples, example):
                    yield Made(self._collator(examples), len(examples) + skipped, skipped)
                    examples, skipped = [], 0
                examples.append(example)
        if examples:
            yield Made(self._collator(examples), len(examples) + skipped, skipped)

    def _tell(self, failure: _Failure, in_a_row: int) -> None:
        """Say of the first sample that is skipped why, and give up when there is no other."""
        if not self._told:
            warnings.warn(f"{failure.message}; it is skipped (data.too_long: skip), as all such are", stacklevel=2)
            self._told = True
        order = self.order
        # Those of two epochs: in each another one may come first.
        if in_a_row >= (2 * order.share if isinstance(order, NumberOrder) and order.endless else _HOPELESS):
            raise ConfigError(f"{failure.message}; so it is with {in_a_row} samples in a row, none is left")

    def _made(self) -> Iterator[Any]:
        """What the workers make: batches, or lists of examples to be put together here."""
        if self._loader is None:
            size, workers = self.config.fixed_size, self.config.workers
            self._loader = DataLoader(
                self._dataset,
                batch_sampler=_Chunks(self.order, size or PACKING_CHUNK),
                collate_fn=_Checked(self._collator) if size else _examples,
                num_workers=workers,
                persistent_workers=workers > 0,
                prefetch_factor=4 if workers else None,
                pin_memory=torch.cuda.is_available(),
                # Its own generator: the default would draw from the global one and shift everything random after it.
                generator=torch.Generator(),
                worker_init_fn=end_with_parent,
            )
            with _inherited_is_kept():
                return iter(self._loader)
        return iter(self._loader)


class TrainLoader:
    """An endless stream of training batches, handed out in passes of a fixed number of batches.

    A new pass goes on where the last one ended. The state is what has been handed out, whatever the workers have
    prepared beyond it: after `load_state_dict` the very next batch is the one that would have come next.

    Several processes must all ask for the state, and each goes on with its own; another number of processes goes on
    where the first one was.

    Args:
        stream: the batches, of an endless order.
        batches: batches in one pass.

    Attributes:
        skipped: samples that this process has skipped since the beginning of training.
    """

    def __init__(self, stream: BatchStream, batches: int) -> None:
        self._stream = stream
        self._batches = batches
        self._samples = 0
        self._in_pass = 0
        self._resumed = False
        self._iterator: Iterator[Made] | None = None
        self.skipped = 0

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        if not self._resumed:
            self._in_pass = 0
        self._resumed = False
        while self._in_pass < self._batches:
            if self._iterator is None:
                self._iterator = iter(self._stream)
            made = next(self._iterator)
            self._samples += made.samples
            self.skipped += made.skipped
            self._in_pass += 1
            yield made.batch

    def state_dict(self) -> dict[str, Any]:
        """Plain values: where the stream stands, and how many batches of the pass are done."""
        own = self._own_state()
        return {**own, "processes": gathered(own)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` returned."""
        states = state.get("processes", [])
        self._load_own(states[process_rank()] if len(states) == processes() else state)

    def _own_state(self) -> dict[str, Any]:
        order = self._stream.order.state_dict(self._samples)
        return {"order": order, "in_pass": self._in_pass, "skipped": self.skipped}

    def _load_own(self, state: dict[str, Any]) -> None:
        self.skipped = int(state.get("skipped", 0))
        self._samples = self._stream.order.load_state_dict(state["order"])
        self._in_pass = int(state["in_pass"]) % self._batches
        self._resumed = True
        self._iterator = None

    def close(self) -> None:
        """End the workers; what was handed out stays counted."""
        state = self._own_state()
        self._stream.close()
        self._load_own(state)


class EvalLoader:
    """The batches of a finite order, the same in every pass.

    Attributes:
        skipped: samples that this process has skipped in the latest pass.
    """

    def __init__(self, stream: BatchStream) -> None:
        self._stream = stream
        self.skipped = 0

    def __len__(self) -> int:
        order, size = self._stream.order, self._stream.config.fixed_size
        if size is None or not isinstance(order, NumberOrder):
            raise TypeError("the number of batches is not known beforehand")
        return -(-order.share // size)

    def __iter__(self) -> Iterator[Batch]:
        self.skipped = 0
        for made in self._stream:
            self.skipped += made.skipped
            yield made.batch

    def close(self) -> None:
        """End the workers; a new pass starts new ones."""
        self._stream.close()


class _Encoded(Dataset[Any]):
    """Examples by the keys of an order; runs in the workers."""

    def __init__(self, source: Source | StreamSource, encoder: SampleEncoder, name: str, skip_long: bool) -> None:
        self.source = source
        self.encoder = encoder
        self.name = name
        self.skip_long = skip_long

    def __getitem__(self, key: Any) -> Example | _Failure:
        try:
            if isinstance(self.source, StreamSource):
                number, row = key
                return self.encoder(self.source.decode(row), f"{self.name} sample {number}")
            epoch, number = key
            return self.encoder(self.source.sample(number, epoch), f"{self.name} {self.source.place(number)}")
        except ConfigError as error:
            return _Failure(str(error), skipped=self.skip_long and isinstance(error, TooLong))


class _Chunks:
    """The keys of an order in lists; a batch sampler."""

    def __init__(self, order: Order, size: int) -> None:
        self.order = order
        self.size = size

    def __iter__(self) -> Iterator[list[Any]]:
        chunk = []
        for key in self.order:
            chunk.append(key)
            if len(chunk) == self.size:
                yield chunk
                chunk = []
        if chunk:
            yield chunk


@dataclass(frozen=True)
class _Checked:
    """The collator, let alone when one of the examples failed; runs in the workers."""

    collator: Collator

    def __call__(self, examples: Sequence[Example | _Failure]) -> Batch | _Failure:
        good = [example for example in examples if isinstance(example, Example)]
        failed = [example for example in examples if isinstance(example, _Failure)]
        return failed[0] if failed else self.collator(good)


def _examples(examples: list[Example | _Failure]) -> list[Example | _Failure]:
    return examples


def _checked(made: Any) -> Any:
    if isinstance(made, _Failure) and not made.skipped:
        raise ConfigError(made.message)
    return made


@contextmanager
def _inherited_is_kept() -> Iterator[None]:
    """Have processes that are forked within the block leave alone what this one holds or has left to be collected.

    Objects that own threads wait for them when they are freed, and no thread comes along with a fork.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def end_with_parent(worker: int = 0) -> None:
    """A worker's first call: let the kernel end this process when the one that started it is killed.

    torch's workers notice that their parent has gone, but one whose results nobody reads any more then waits for ever.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
