"""Robust statistics of interleaved timings: medians, quartiles, ratios with an interval, and how cost grows."""

from __future__ import annotations

import math
import operator
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_LEVEL = 0.95


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some numbers."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Ratio:
    """The ratio of two sides within each round.

    Attributes:
        median, quartile_low, quartile_high: of the rounds' ratios.
        low, high: an interval for the median by order statistics.
        level: the interval's coverage; below 0.95 only where there are too few rounds.
    """

    median: float
    quartile_low: float
    quartile_high: float
    low: float
    high: float
    level: float


@dataclass(frozen=True)
class Growth:
    """How cost grows with length.

    Attributes:
        exponent: slope of log cost against log length, 1 when cost is proportional to length.
        fixed, per_unit: the line cost = fixed + per_unit * length, fitted to relative errors.
        deviation: the largest relative distance of a measured cost from that line.
    """

    exponent: float
    fixed: float
    per_unit: float
    deviation: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles; one value is its own quartiles."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high)


def ratio(over: Sequence[float], under: Sequence[float]) -> Ratio:
    """over / under, round by round: the sides of one round saw the same disturbances."""
    found = sorted(a / b for a, b in zip(over, under, strict=True))
    middle = spread(found)
    rank, level = _interval_rank(len(found))
    return Ratio(middle.median, middle.low, middle.high, found[rank], found[-1 - rank], level)


def growth(lengths: Sequence[float], costs: Sequence[float]) -> Growth:
    """Exponent and line through at least two (length, cost) points, both costs and lengths above 0."""
    logs = [math.log(x) for x in lengths], [math.log(y) for y in costs]
    exponent = statistics.linear_regression(*logs).slope
    # Least squares of (fixed + slope x) / y - 1: every point counts the same, however small.
    u, v = [1 / y for y in costs], [x / y for x, y in zip(lengths, costs, strict=True)]
    uu, uv, vv = (sum(map(operator.mul, a, b)) for a, b in ((u, u), (u, v), (v, v)))
    det = uu * vv - uv * uv
    fixed, slope = (sum(u) * vv - sum(v) * uv) / det, (sum(v) * uu - sum(u) * uv) / det
    deviation = max(abs(fixed * a + slope * b - 1) for a, b in zip(u, v, strict=True))
    return Growth(exponent, fixed, slope, deviation)


def _interval_rank(count: int) -> tuple[int, float]:
    """Largest rank k for which [k-th smallest, k-th largest] covers the median with `_LEVEL`, and its coverage."""
    tail, best = 0.0, (0, max(0.0, 1 - 2 * 0.5**count))
    for rank in range(count // 2):
        tail += math.comb(count, rank) * 0.5**count
        if 1 - 2 * tail < _LEVEL:
            break
        best = rank, 1 - 2 * tail
    return best
