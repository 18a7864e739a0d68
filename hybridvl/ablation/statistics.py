"""Means over seeds with intervals, paired differences with a test, Holm's correction, and Pareto fronts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special  # scipy.stats has the same and more, but takes a second to import

Method = Literal["t", "bootstrap"]

LEVEL = 0.95
RESAMPLES = 10_000
_EXACT = 16  # pairs up to which all 2^n assignments of signs are counted
_ROUNDING = 1e-9  # of the largest value: what differs by less differs by rounding


@dataclass(frozen=True)
class Interval:
    """A mean and an interval that covers the true mean in `level` of all repetitions.

    Attributes:
        mean: of the values; NaN when there are none.
        low, high: ends of the interval; NaN for fewer than two values, which say nothing of their spread.
        deviation: sample standard deviation (n - 1), 0 where values differ by rounding alone; NaN for fewer than two.
        count: how many values.
    """

    mean: float
    low: float
    high: float
    deviation: float
    count: int

    @property
    def half_width(self) -> float:
        """Half the interval's length."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Difference:
    """Differences of pairs, value minus baseline, and how likely so large a mean is if there were none.

    Attributes:
        interval: of the mean difference.
        p: two-sided p value; NaN for fewer than two pairs, and by Student's t for differences without any spread.
        pairs: what stood in both, in order (seeds).
        differences: of each pair.
    """

    interval: Interval
    p: float
    pairs: tuple[int, ...]
    differences: tuple[float, ...]


def mean_interval(values: Sequence[float], method: Method = "t", level: float = LEVEL) -> Interval:
    """Mean and interval of independent values.

    Args:
        values: finite numbers, one a seed.
        method: "t", Student's t, exact for normal values; "bootstrap", percentiles of the means of `RESAMPLES`
            resamples (with a fixed seed), which assumes no distribution but is too narrow for few values.
        level: of the interval, between 0 and 1.
    """
    array = np.asarray(values, dtype=np.float64)
    return _interval(array, method, level, float(np.abs(array).max(initial=0.0)))


def share_interval(share: float, count: int, level: float = LEVEL) -> Interval:
    """The exact interval (Clopper and Pearson, 1934) of a share of the answers of one run: a sample, even where all
    seeds came to the same.

    Args:
        share: of right answers, from 0 to 1.
        count: answers, at least 1.
        level: of the interval.
    """
    right, tail = round(share * count), (1 - level) / 2
    low = float(special.betaincinv(right, count - right + 1, tail)) if right else 0.0
    high = float(special.betaincinv(right + 1, count - right, 1 - tail)) if right < count else 1.0
    return Interval(share, low, high, 0.0, 1)


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float], method: Method = "t", level: float = LEVEL
) -> Difference:
    """Value minus baseline, seed by seed: what a seed makes easier or harder for both drops out.

    Args:
        values, baseline: a finite number for each seed; seeds that only one of them has are left out.
        method: "t": Student's interval and the paired t test; "bootstrap": percentiles, and the sign-flip test, which
            counts in how many of the 2^n assignments of signs the mean is at least as far from 0 (its smallest p value
            is 2^(1 - n), 0.25 for three pairs).
        level: of the interval.
    """
    seeds = tuple(sorted(set(values) & set(baseline)))
    scale = max((abs(found[seed]) for seed in seeds for found in (values, baseline)), default=0.0)
    exact = [values[seed] - baseline[seed] for seed in seeds]
    differences = tuple(0.0 if abs(difference) <= 1e-12 * scale else difference for difference in exact)
    interval = _interval(np.asarray(differences, dtype=np.float64), method, level, scale)
    if len(seeds) < 2:
        return Difference(interval, math.nan, seeds, differences)
    p = _sign_flip(np.asarray(differences)) if method == "bootstrap" else _t_test(interval)
    return Difference(interval, p, seeds, differences)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for all comparisons of the family at once (Holm, 1979), in the same order.

    Below alpha means: significant, with at most a chance of alpha of one false claim in the whole family. NaN stays NaN
    and does not count as a comparison.
    """
    tested = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    corrected = [math.nan] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        corrected[index] = largest
    return corrected


def pareto_front(costs: Sequence[float], qualities: Sequence[float]) -> list[int]:
    """Indices of the points that no other one beats, by rising cost.

    A point is beaten by one that costs no more and is no worse, and differs in at least one of the two; of equal points
    none beats the other. Points that are not finite are not on the front.
    """
    points = [
        (cost, -quality, index)
        for index, (cost, quality) in enumerate(zip(costs, qualities, strict=True))
        if math.isfinite(cost) and math.isfinite(quality)
    ]
    front: list[int] = []
    best, at = math.inf, math.nan
    for cost, loss, index in sorted(points):
        if loss < best or (loss == best and cost == at):
            front.append(index)
            best, at = loss, cost
    return front


@lru_cache(maxsize=64)
def _t_quantile(freedom: int, level: float) -> float:
    return float(special.stdtrit(freedom, (1 + level) / 2))


def _interval(array: NDArray[np.float64], method: Method, level: float, scale: float) -> Interval:
    """As `mean_interval`. scale: of the values that the array was computed from, to know what is rounding."""
    count = len(array)
    if count < 2:
        return Interval(float(array[0]) if count else math.nan, math.nan, math.nan, math.nan, count)
    mean, deviation = float(array.mean()), float(array.std(ddof=1))
    if deviation <= _ROUNDING * scale:
        return Interval(mean, mean, mean, 0.0, count)
    if method == "bootstrap":
        low, high = np.quantile(array[_resamples(count)].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
        return Interval(mean, float(low), float(high), deviation, count)
    half = _t_quantile(count - 1, level) * deviation / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, deviation, count)


def _t_test(interval: Interval) -> float:
    if interval.deviation == 0.0:
        return math.nan  # any mean but 0 would be beyond doubt, by a spread that so few values did not show
    t = interval.mean / (interval.deviation / math.sqrt(interval.count))
    return float(2 * special.stdtr(interval.count - 1, -abs(t)))


def _sign_flip(differences: NDArray[np.float64]) -> float:
    """Exact for up to `_EXACT` pairs, else from `RESAMPLES` random assignments, the observed one among them."""
    count = len(differences)
    observed = abs(differences.sum())
    tolerance = 1e-12 * np.abs(differences).sum()  # sums that differ by rounding alone are equal
    if count > _EXACT:
        signs = np.random.default_rng(0).integers(0, 2, (RESAMPLES, count)) * 2 - 1
        reached = int((np.abs(signs @ differences) >= observed - tolerance).sum())
        return (reached + 1) / (RESAMPLES + 1)
    numbers = np.arange(1 << count)
    signs = 1 - 2 * ((numbers[:, None] >> np.arange(count)) & 1)
    return float((np.abs(signs @ differences) >= observed - tolerance).mean())


@lru_cache(maxsize=16)
def _resamples(count: int) -> NDArray[np.int64]:
    """(RESAMPLES, count) which values each resample draws; the same ones every time, so that reports repeat."""
    return np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
