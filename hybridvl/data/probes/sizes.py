"""How much a sample of a probe holds: sizes that are drawn, ranges that are checked, and names of slices."""

from __future__ import annotations

import numpy as np

from hybridvl.data.task import require_span
from hybridvl.layers.errors import ConfigError

_MOST_SKEW = 10


def bucket(number: int) -> str:
    """The numbers of about the same size, up to a power of two: "1", "2", "3_4", "5_8" and so on."""
    high = 1 << (number - 1).bit_length()
    return str(high) if high <= 2 else f"{high // 2 + 1}_{high}"


def load_prefix(name: str, number: int, span: tuple[int, int]) -> str:
    """What a kind begins with where a load is swept, such as "items_5_8_"; "" where all samples have the same."""
    return f"{name}_{bucket(number)}_" if span[0] < span[1] else ""


def require_number(name: str, value: float, most: float) -> None:
    """Raise ConfigError unless the setting data.task.NAME is a number from 0 to `most`."""
    if not 0 <= value <= most:
        raise ConfigError(f"data.task.{name}: {value}; expected a number from 0 to {most}")


def skewed_size(rng: np.random.Generator, span: tuple[int, int], skew: float) -> int:
    """A number from a range, n with a weight of n ** -skew."""
    if skew == 0:
        return int(rng.integers(span[0], span[1] + 1))
    numbers = np.arange(span[0], span[1] + 1)
    weights = numbers.astype(float) ** -skew
    return int(rng.choice(numbers, p=weights / weights.sum()))


def require_skew(skew: float) -> None:
    """Raise ConfigError unless the setting data.task.skew is one that `skewed_size` takes."""
    require_number("skew", skew, _MOST_SKEW)


def require_lag(lag: tuple[int, int] | None, fewest: int, most: int) -> tuple[int, int] | None:
    """The range of lags data.task.lag, or null for any; ConfigError unless streams of the `fewest` frames have some.

    most: largest number that a lag may have.
    """
    if lag is None:
        return None
    low, high = require_span("data.task.lag", lag, most)
    if low > fewest:
        raise ConfigError(
            f"data.task.lag: {[low, high]}; expected a smallest lag of at most the fewest frames, {fewest}"
        )
    return low, high
