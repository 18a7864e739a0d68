"""Loaders: batches made in worker processes, the same ones however many workers there are, resumable exactly."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from hybridvl.data.collate import Batch, Collator
from hybridvl.data.encode import Example, SampleEncoder
from hybridvl.data.order import NumberOrder, Order
from hybridvl.data.task import Source, StreamSource
from hybridvl.layers.errors import ConfigError

PACKING_CHUNK = 8
"""Examples that a worker makes at a time when the main process packs them."""

_PR_SET_PDEATHSIG = 1  # of Linux's prctl


@dataclass(frozen=True)
class _Failure:
    """A ConfigError on its way from a worker to the main process, where its message is shown as it is."""

    message: str


@dataclass(frozen=True)
class LoaderConfig:
    """How batches are made.

    Attributes:
        batch_size: samples in a padded batch.
        max_tokens: with packing, tokens in a row at most.
        packing: pack samples into one row instead of padding them.
        workers: worker processes; 0 makes batches in the main process.
    """

    batch_size: int
    max_tokens: int
    packing: bool
    workers: int


class BatchStream:
    """Batches of one order of one source, each with the number of samples in it."""

    def __init__(
        self, source: Source | StreamSource, order: Order, encoder: SampleEncoder, config: LoaderConfig, name: str
    ) -> None:
        self.order = order
        self.config = config
        merge_size = encoder.images.config.merge_size
        self._collator = Collator(encoder.chat, merge_size, packing=config.packing, videos=encoder.videos.config)
        self._dataset = _Encoded(source, encoder, name)
        self._loader: DataLoader[Any] | None = None

    def __iter__(self) -> Iterator[tuple[Batch, int]]:
        try:
            yield from self._packed() if self.config.packing else self._padded()
        except ConfigError:
            self.close()
            raise

    def close(self) -> None:
        """End the workers; iterating again starts new ones."""
        # Dropped here and not left to the garbage collector, which takes queues and workers apart in any order and then
        # waits for workers that were never told to end.
        self._loader = None

    def _padded(self) -> Iterator[tuple[Batch, int]]:
        for made in self._made():
            batch = _checked(made)
            yield batch, len(batch["input_ids"])

    def _packed(self) -> Iterator[tuple[Batch, int]]:
        row: list[Example] = []
        for chunk in self._made():
            for example in map(_checked, chunk):
                if sum(map(len, row)) + len(example) > self.config.max_tokens:
                    yield self._collator(row), len(row)
                    row = []
                row.append(example)
        if row:
            yield self._collator(row), len(row)

    def _made(self) -> Iterator[Any]:
        """What the workers make: batches, or lists of examples to be packed here."""
        if self._loader is None:
            packing, workers = self.config.packing, self.config.workers
            self._loader = DataLoader(
                self._dataset,
                batch_sampler=_Chunks(self.order, PACKING_CHUNK if packing else self.config.batch_size),
                collate_fn=_examples if packing else _Checked(self._collator),
                num_workers=workers,
                persistent_workers=workers > 0,
                prefetch_factor=4 if workers else None,
                pin_memory=torch.cuda.is_available(),
                # Its own generator: the default would draw from the global one and shift everything random after it.
                generator=torch.Generator(),
                worker_init_fn=end_with_parent,
            )
        return iter(self._loader)


class TrainLoader:
    """An endless stream of training batches, handed out in passes of a fixed number of batches.

    A new pass goes on where the last one ended. The state is what has been handed out, whatever the workers have
    prepared beyond it: after `load_state_dict` the very next batch is the one that would have come next.

    Args:
        stream: the batches, of an endless order.
        batches: batches in one pass.
    """

    def __init__(self, stream: BatchStream, batches: int) -> None:
        self._stream = stream
        self._batches = batches
        self._samples = 0
        self._in_pass = 0
        self._resumed = False
        self._iterator: Iterator[tuple[Batch, int]] | None = None

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        if not self._resumed:
            self._in_pass = 0
        self._resumed = False
        while self._in_pass < self._batches:
            if self._iterator is None:
                self._iterator = iter(self._stream)
            batch, samples = next(self._iterator)
            self._samples += samples
            self._in_pass += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Plain values: where the stream stands, and how many batches of the pass are done."""
        return {"order": self._stream.order.state_dict(self._samples), "in_pass": self._in_pass}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` returned."""
        self._samples = self._stream.order.load_state_dict(state["order"])
        self._in_pass = int(state["in_pass"]) % self._batches
        self._resumed = True
        self._iterator = None

    def close(self) -> None:
        """End the workers; what was handed out stays counted."""
        state = self.state_dict()
        self._stream.close()
        self.load_state_dict(state)


class EvalLoader:
    """The batches of a finite order, the same in every pass."""

    def __init__(self, stream: BatchStream) -> None:
        self._stream = stream

    def __len__(self) -> int:
        order, config = self._stream.order, self._stream.config
        if config.packing or not isinstance(order, NumberOrder):
            raise TypeError("the number of batches is not known beforehand")
        return -(-order.share // config.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for batch, _ in self._stream:
            yield batch

    def close(self) -> None:
        """End the workers; a new pass starts new ones."""
        self._stream.close()


class _Encoded(Dataset[Any]):
    """Examples by the keys of an order; runs in the workers."""

    def __init__(self, source: Source | StreamSource, encoder: SampleEncoder, name: str) -> None:
        self.source = source
        self.encoder = encoder
        self.name = name

    def __getitem__(self, key: Any) -> Example | _Failure:
        try:
            if isinstance(self.source, StreamSource):
                number, row = key
                return self.encoder(self.source.decode(row), f"{self.name} sample {number}")
            epoch, number = key
            return self.encoder(self.source.sample(number, epoch), f"{self.name} {self.source.place(number)}")
        except ConfigError as error:
            return _Failure(str(error))


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
    if isinstance(made, _Failure):
        raise ConfigError(made.message)
    return made


def end_with_parent(worker: int = 0) -> None:
    """A worker's first call: let the kernel end this process when the one that started it is killed.

    torch's workers notice that their parent has gone, but one whose results nobody reads any more then waits for ever.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
