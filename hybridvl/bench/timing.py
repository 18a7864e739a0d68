"""Interleaved timing: the sides take turns round by round, so that a disturbance hits all of them."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from hybridvl.bench.sides import Results, Side

Timer = Callable[[Callable[[], Results], int], float]
"""(work, how often to do it) -> seconds each."""

_SHORTEST = 2e-3  # seconds that a timed sample lasts at least: shorter work is repeated within it


def timer(device: str) -> Timer:
    """Seconds of a piece of work on a device: by CUDA events on a GPU, by the wall clock elsewhere."""
    return _cuda_seconds if torch.device(device).type == "cuda" else _wall_seconds


def interleave(
    sides: Sequence[Side], rounds: int, warmup: int, measure: Timer, progress: Callable[[str], None] | None = None
) -> dict[str, list[float]]:
    """Seconds of each side in each round; every round begins with another side."""
    repeats = {}
    for side in sides:
        seconds = [_seconds(side, 1, measure) for _ in range(max(1, warmup))]
        repeats[side.name] = max(1, math.ceil(_SHORTEST / max(min(seconds), 1e-9)))
    found: dict[str, list[float]] = {side.name: [] for side in sides}
    for number in range(rounds):
        if progress is not None:
            progress(f"round {number + 1} of {rounds}")
        first = number % len(sides)
        with _no_collection():
            for side in (*sides[first:], *sides[:first]):
                found[side.name].append(_seconds(side, repeats[side.name], measure))
    return found


def _seconds(side: Side, repeats: int, measure: Timer) -> float:
    if side.before is None:
        return measure(side.run, repeats)
    total = 0.0
    for _ in range(repeats):
        side.before()
        total += measure(side.run, 1)
    return total / repeats


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Python's garbage is collected before, not while the clock runs."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _wall_seconds(run: Callable[[], Results], repeats: int) -> float:
    total = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        kept = run()
        total += time.perf_counter() - start
        del kept  # not timed
    return total / repeats


def _cuda_seconds(run: Callable[[], Results], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / repeats
