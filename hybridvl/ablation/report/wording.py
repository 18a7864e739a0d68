"""Numbers as reports write them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hybridvl.ablation.statistics import Interval

UNKNOWN = "-"


def number(value: float | None) -> str:
    """0.8333 -> "0.833", 12.3456 -> "12.35", 12345.6 -> "12,346", 0.00001 -> "1.00e-05"; `UNKNOWN` for None and NaN."""
    if value is None or math.isnan(value):
        return UNKNOWN
    if value and (abs(value) < 1e-3 or abs(value) >= 1e9):
        return f"{value:.2e}"
    whole = len(f"{abs(value):.0f}")  # digits before the point
    return f"{value:,.{max(0, min(3, 4 - whole))}f}"


def with_interval(interval: Interval, sign: str = "") -> str:
    """A mean and its interval, "0.880 [0.834, 0.926]"; the mean alone where there is none.

    sign: "+" to write it before a mean above 0.
    """
    # Beside an interval that is wider, more digits of a mean near 0 say nothing.
    near = abs(interval.mean) < 1e-3 <= max(abs(interval.low), abs(interval.high))
    mean = f"{interval.mean:.4f}" if near else number(interval.mean)
    if sign and interval.mean > 0:
        mean = sign + mean
    if math.isnan(interval.low):
        return mean
    return f"{mean} [{number(interval.low)}, {number(interval.high)}]"


def probability(p: float) -> str:
    """ "0.0213", "< 0.001"."""
    if math.isnan(p):
        return UNKNOWN
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def counted(count: int, noun: str, plural: str = "") -> str:
    """ "1 run", "2 runs"."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def without_nan(value: Any) -> Any:
    """Mappings and lists as JSON can hold them: NaN and infinite numbers are null there."""
    if isinstance(value, Mapping):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
