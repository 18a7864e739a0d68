"""The processes of a run: how many there are, which one this is, and what all of them hold."""

from __future__ import annotations

from typing import Any

from torch import distributed


def processes() -> int:
    """Processes of this run."""
    return distributed.get_world_size() if started() else 1


def process_rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if started() else 0


def gathered(value: Any) -> list[Any]:
    """The plain values of all processes by rank; all of them must call this."""
    if not started():
        return [value]
    values: list[Any] = [None] * processes()
    distributed.all_gather_object(values, value)
    return values


def started() -> bool:
    """Whether this is one of several processes that have met."""
    return distributed.is_available() and distributed.is_initialized()
