"""Slices of a metric: its values by kind of question, ordered where the kinds are ranges of numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hybridvl.ablation.report.labels import natural

_RANGES = re.compile(r"(?:[a-z]+(?:_[a-z]+)*_\d+(?:_\d+)?_?)+")
_RANGE = re.compile(r"(?P<axis>[a-z]+(?:_[a-z]+)*?)_(?P<low>\d+)(?:_(?P<high>\d+))?(?=_|$)_?")


@dataclass(frozen=True)
class Slices:
    """Metrics that are one metric over a part of the samples each.

    Attributes:
        axis: what the parts are ranges of, such as "lag"; "kind" for parts that are no ranges.
        panel: what they have in common: "items 5-8", or "".
        labels: of each part: "1", "3-4", or the kind.
        metrics: of each part, in order.
        ordered: whether the parts are ranges, so that a line may join them.
    """

    axis: str
    panel: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    ordered: bool


def slices_of(metric: str, logged: Sequence[str]) -> list[Slices]:
    """The slices of a metric among those that were logged: test/lag_3_4_exact is one of test/exact.

    Kinds of several ranges, such as items_5_8_lag_3_4, are over the last one, a panel for each value of the others.
    """
    split, _, name = metric.rpartition("/")
    start = f"{split}/" if split else ""
    ending = f"_{name}"
    kinds = [
        other.removeprefix(start).removesuffix(ending)
        for other in logged
        if other != metric and other.startswith(start) and other.endswith(ending) and "/" not in other[len(start) :]
    ]
    groups: dict[tuple[str, str], list[tuple[tuple[int, int], str, str]]] = {}
    rest = []
    for kind in kinds:
        ranges = [*_RANGE.finditer(kind)] if _RANGES.fullmatch(kind) else []
        if not ranges:
            rest.append(kind)
            continue
        panel = ", ".join(f"{part['axis'].replace('_', ' ')} {_span(part)}" for part in ranges[:-1])
        last = ranges[-1]
        place = (int(last["low"]), int(last["high"] or last["low"]))
        groups.setdefault((last["axis"].replace("_", " "), panel), []).append((place, _span(last), kind))
    found = []
    for axis, panel in sorted(groups, key=lambda key: (key[0], natural(key[1]))):
        parts = sorted(groups[axis, panel])
        metrics = tuple(f"{start}{kind}{ending}" for _, _, kind in parts)
        found.append(Slices(axis, panel, tuple(label for _, label, _ in parts), metrics, True))
    if rest:
        rest.sort(key=natural)
        found.append(Slices("kind", "", tuple(rest), tuple(f"{start}{kind}{ending}" for kind in rest), False))
    return found


def _span(part: re.Match[str]) -> str:
    return part["low"] if part["high"] is None else f"{part['low']}-{part['high']}"
