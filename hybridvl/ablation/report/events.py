"""TensorBoard's event files: scalars alone, checked and read fast."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event

POINTS = 1000  # that are kept of a curve; longer ones are thinned evenly
_HEADER = struct.Struct("<QI")  # length of the record, checksum of the length
_CHECKSUM = struct.Struct("<I")  # of the record, behind it
_LONGEST = 512  # bytes of a record with a scalar; longer ones are pictures and texts, which are passed over
_POLYNOMIAL = 0x82F63B78  # CRC-32C, reflected
_MASK = 0xA282EAD8


class CorruptEvents(Exception):
    """An event file whose records do not fit their checksums."""


@dataclass(frozen=True)
class Curve:
    """A scalar over steps.

    Attributes:
        steps: int64 (points,), rising.
        values: float64 (points,).
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


def read_events(path: Path) -> dict[str, Curve]:
    """The scalars of one event file by tag.

    A file that ends in the middle of a record, as that of a killed run may, has all records before it. Raises
    CorruptEvents, OSError.
    """
    data = path.read_bytes()
    starts, lengths = _records(data)
    points: dict[str, tuple[list[int], list[float]]] = {}
    for start, length in zip(starts, lengths, strict=True):
        try:
            event = Event.FromString(data[start : start + length])
        except DecodeError as error:
            raise CorruptEvents(f"the record at byte {start} is no event") from error
        for value in event.summary.value:
            if value.HasField("simple_value"):
                steps, values = points.setdefault(value.tag, ([], []))
                steps.append(event.step)
                values.append(value.simple_value)
    return {tag: _curve(*found) for tag, found in points.items()}


def merged(parts: Iterable[dict[str, Curve]]) -> dict[str, Curve]:
    """The scalars of several files of one run, in the order in which they were written: a later value of a step wins,
    as a resumed run repeats the steps after its checkpoint."""
    found: dict[str, list[Curve]] = {}
    for part in parts:
        for tag, curve in part.items():
            found.setdefault(tag, []).append(curve)
    return {
        tag: curves[0]
        if len(curves) == 1
        else _curve(np.concatenate([c.steps for c in curves]), np.concatenate([c.values for c in curves]))
        for tag, curves in found.items()
    }


def _records(data: bytes) -> tuple[list[int], list[int]]:
    """Where the records that can hold a scalar begin, and their lengths; CorruptEvents where checksums do not fit."""
    heads, starts, lengths = [], [], []
    at = 0
    while at + _HEADER.size <= len(data):
        length, _ = _HEADER.unpack_from(data, at)
        heads.append(at)
        start = at + _HEADER.size
        at = start + length + _CHECKSUM.size
        if length <= _LONGEST and at <= len(data):
            starts.append(start)
            lengths.append(length)
    if not heads:
        return [], []
    array = np.frombuffer(data, np.uint8)
    _check(array, np.array(heads), np.full(len(heads), 8))
    if starts:
        _check(array, np.array(starts), np.array(lengths))
    return starts, lengths


def _check(data: NDArray[np.uint8], starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
    """Raise CorruptEvents unless every stretch of bytes is followed by its masked CRC-32C."""
    order = np.argsort(-lengths, kind="stable")
    starts, lengths = starts[order], lengths[order]
    table = _table()
    sums = np.full(len(starts), 0xFFFFFFFF, np.uint32)
    # Column by column over all stretches at once; the longest come first, so those that go on are a leading part.
    for column, active in enumerate(np.searchsorted(-lengths, -np.arange(lengths[0], dtype=np.int64), side="left")):
        part = sums[:active]
        sums[:active] = table[(part ^ data[starts[:active] + column]) & 0xFF] ^ (part >> 8)
    sums ^= np.uint32(0xFFFFFFFF)
    masked = ((sums >> 15) | (sums << 17)) + np.uint32(_MASK)
    ends = (starts + lengths)[:, None] + np.arange(_CHECKSUM.size)
    wrong = np.flatnonzero(masked != np.ascontiguousarray(data[ends]).view("<u4")[:, 0])
    if len(wrong):
        raise CorruptEvents(f"wrong checksum of the record at byte {int(starts[wrong].min())}")


@lru_cache(maxsize=1)
def _table() -> NDArray[np.uint32]:
    sums = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        sums = np.where(sums & 1, (sums >> 1) ^ np.uint32(_POLYNOMIAL), sums >> 1).astype(np.uint32)
    return sums


def _curve(steps: list[int] | NDArray[np.int64], values: list[float] | NDArray[np.float64]) -> Curve:
    """Sorted by step, the last value of each, thinned to `POINTS` with the last one kept."""
    at, y = np.asarray(steps, np.int64), np.asarray(values, np.float64)
    # The first of each step in the reversed order is the last that was written.
    at, index = np.unique(at[::-1], return_index=True)
    y = y[::-1][index]
    if len(at) > POINTS:
        kept = np.linspace(0, len(at) - 1, POINTS).round().astype(np.int64)
        at, y = at[kept], y[kept]
    return Curve(at, y)
