"""How attention along a band is cut into blocks of queries and runs of blocks."""

from __future__ import annotations

import bisect
from typing import NamedTuple

BLOCK = 64  # queries
ALIGNMENT = 16  # of the number of a block's keys: products of such sizes are faster
_RUN = 1024  # keys whose copies serve several blocks, at least


class Block(NamedTuple):
    """Queries start to stop - 1 over keys first to last - 1; boundaries: where segments begin between the queries."""

    start: int
    stop: int
    first: int
    last: int
    boundaries: tuple[int, ...] = ()


class Run(NamedTuple):
    """Blocks in a row over keys first to last - 1."""

    first: int
    last: int
    blocks: list[Block]


def band_blocks(queries: int, keys: int, window: int, bounds: tuple[int, ...] = ()) -> list[Block]:
    """The blocks of queries that stand at the last of the keys; bounds: 0, ..., T of packed segments."""
    width = min(window, keys)
    offset = keys - queries
    starts = sorted(set(bounds[:-1]))
    blocks = []
    for start in range(0, queries, BLOCK):
        stop = min(start + BLOCK, queries)
        first = max(offset + stop - -(-(stop - start + width - 1) // ALIGNMENT) * ALIGNMENT, 0)
        if not starts:
            blocks.append(Block(start, stop, first, offset + stop))
            continue
        own = bisect.bisect_right(starts, start)
        inner = tuple(starts[own : bisect.bisect_left(starts, stop)])
        blocks.append(Block(start, stop, max(first, starts[own - 1]), stop, inner))
    return blocks


def band_runs(queries: int, keys: int, window: int, bounds: tuple[int, ...] = ()) -> list[Run]:
    """The blocks, gathered so that their keys together are about twice those of one of them."""
    runs: list[Run] = []
    limit = 2 * max(min(window, keys), _RUN)
    for block in band_blocks(queries, keys, window, bounds):
        if runs and block.last - runs[-1].first <= limit:
            runs[-1] = Run(runs[-1].first, block.last, [*runs[-1].blocks, block])
        else:
            runs.append(Run(block.first, block.last, [block]))
    return runs
