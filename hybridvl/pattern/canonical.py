"""The canonical text of a list of layers: the shortest way to write it with repetitions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

_ROTATIONS = 256  # layers that are spelled again, per repeated stretch, to find where its unit is best cut


def canonical(layers: Sequence[str]) -> str:
    """The layers as a pattern, a function of the list alone.

    A list that ends within a repetition is tiled ("(swa gdn*7)@36") where that is shorter. All places are tried where
    a repeated unit of up to 16 layers may be cut, and a few good ones for longer units, so that the work grows about
    as n * log n in Python steps, and as n ** 2 in vectorised comparisons.
    """
    names = list(dict.fromkeys(layers))
    numbers = {name: number for number, name in enumerate(names)}
    speller = _Speller(names)
    written = tuple(numbers[layer] for layer in layers)
    text = speller.spell(written)
    tile = period(written)
    if len(written) % tile and len(written) >= 2 * tile:
        tiled = f"({speller.spell(written[:tile])})@{len(written)}"
        return tiled if len(tiled) < len(text) else text
    return text


def period(layers: Sequence[object]) -> int:
    """The smallest p with layers[i] == layers[i + p] throughout, by Knuth, Morris and Pratt's failure function."""
    border = [0]
    for layer in layers[1:]:
        length = border[-1]
        while length and layers[length] != layer:
            length = border[length - 1]
        border.append(length + (layers[length] == layer))
    return len(layers) - border[-1]


@dataclass(frozen=True)
class _Stretch:
    """A maximal stretch [start, stop) that repeats its first `period` layers at least twice; no smaller period does."""

    start: int
    stop: int
    period: int


@dataclass(frozen=True)
class _Step:
    """The cheapest way to write layers[:stop]: layers[:before], then `text`; cost in characters, then in groups."""

    cost: tuple[int, int]
    before: int
    text: str


@dataclass
class _Speller:
    """Writes tuples of layer numbers; what it has written once it remembers."""

    names: list[str]
    known: dict[tuple[int, ...], str] = field(default_factory=dict)

    def spell(self, layers: tuple[int, ...]) -> str:
        """The layers as groups separated by spaces. Recursion ends: each level has at most half as many layers."""
        if len(layers) == 1:
            return self.names[layers[0]]
        if layers not in self.known:
            unit = period(layers)
            whole = len(layers) % unit == 0 and unit < len(layers)
            self.known[layers] = self.repeated(layers[:unit], len(layers) // unit) if whole else self.shortest(layers)
        return self.known[layers]

    def repeated(self, unit: tuple[int, ...], count: int) -> str:
        text = self.spell(unit)
        return f"({text})*{count}" if len(unit) > 1 else f"{text}*{count}"

    def shortest(self, layers: tuple[int, ...]) -> str:
        """Shortest path over the positions between layers: a step writes one layer or one repetition."""
        steps: list[list[tuple[int, str]]] = [[] for _ in layers]  # by first layer: (end, text)
        for start, number in enumerate(layers):
            steps[start].append((start + 1, self.names[number]))
        for stretch in _stretches(layers):
            for start, count in _cuts(layers, stretch):
                unit = layers[start : start + stretch.period]
                steps[start].append((start + count * stretch.period, self.repeated(unit, count)))
        best: list[_Step | None] = [_Step((0, 0), 0, ""), *(None for _ in layers)]
        for start, leaving in enumerate(steps):
            here = best[start]
            assert here is not None  # a single layer leads from every position to the next
            for stop, text in leaving:
                there, cost = best[stop], (here.cost[0] + len(text) + 1, here.cost[1] + 1)
                if there is None or cost < there.cost:
                    best[stop] = _Step(cost, start, text)
        return " ".join(reversed(list(_walk_back(best))))


def _walk_back(best: list[_Step | None]) -> Iterator[str]:
    position = len(best) - 1
    while position:
        step = best[position]
        assert step is not None
        yield step.text
        position = step.before


def _cuts(layers: tuple[int, ...], stretch: _Stretch) -> Iterator[tuple[int, int]]:
    """Where a repetition within the stretch may begin, and its count.

    The best cut is mostly where the stretch begins or where the layer changes. From a unit's first copy on, all counts
    are tried; from later ones (the earlier copies may belong to something longer) the one that fills the stretch.
    """
    period = stretch.period
    offsets = sorted(range(period), key=lambda i: i > 0 and layers[stretch.start + i] == layers[stretch.start + i - 1])
    for offset in offsets[: max(_ROTATIONS // period, 1)]:
        start = stretch.start + offset
        most = (stretch.stop - start) // period
        for count in range(2, most + 1):
            yield start, count
        for skipped in range(1, most - 1):
            yield start + skipped * period, most - skipped


def _stretches(layers: tuple[int, ...]) -> list[_Stretch]:
    """All maximal repetitive stretches, by period."""
    array = np.asarray(layers)
    found: dict[tuple[int, int], _Stretch] = {}
    for period in range(1, len(layers) // 2 + 1):
        same = np.concatenate(([False], array[period:] == array[:-period], [False]))
        edges = np.flatnonzero(same[1:] != same[:-1])
        for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            # The same stretch at a multiple of its period is not a new one.
            if stop - start >= period and (start, stop + period) not in found:
                found[start, stop + period] = _Stretch(start, stop + period, period)
    return list(found.values())
