"""Numbers as reports write them."""

from __future__ import annotations

import math

from hybridvl.ablation.report.analysis import Analysis
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
    mean = number(interval.mean)
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


def headline(analysis: Analysis) -> str:
    """ "24 runs in 8 cells: 22 done, 2 failed"."""
    statuses = ", ".join(f"{count:,} {status}" for status, count in analysis.statuses.items())
    return f"{counted(len(analysis.runs), 'run')} in {counted(len(analysis.cells), 'cell')}: {statuses}"


def method(analysis: Analysis) -> str:
    """How intervals and tests were made, as sentences."""
    settings = analysis.settings
    level = f"{100 * settings.level:g} %"
    how = "by Student's t" if settings.interval == "t" else "by the bootstrap (percentiles of 10,000 resamples)"
    said = f"Means over seeds with {level} intervals {how}."
    if settings.baseline and any(index is not None for index in analysis.baselines):
        test = "paired t test" if settings.interval == "t" else "sign-flip test"
        baseline = ", ".join(f"{key}={value}" for key, value in settings.baseline.items())
        said += (
            f" Differences are those of equal seeds, to the cell with {baseline} and otherwise the same labels; p "
            f"is of the {test}, corrected by Holm over all comparisons of the metric."
        )
    return said
