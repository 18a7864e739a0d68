"""Ranges of numbers that a search draws from, and the texts of their values."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any

from hybridvl.layers.errors import ConfigError
from hybridvl.pipeline.mappings import require_known, require_mapping

_KEYS = ("low", "high", "step", "log")
_MOST_WHOLE = 2**53  # beyond it not every whole number is a float
_DIGITS = 3  # further ones that a number has after its first


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both among them; whole ones if all that is given is whole.

    Attributes:
        low: the smallest.
        high: the largest.
        step: how far one is from the next; None: 1 for whole numbers, anything for others.
        log: whether all orders of magnitude are equally likely.
    """

    low: float
    high: float
    step: float | None = None
    log: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether its values are whole numbers."""
        return isinstance(self.low, int)

    @property
    def count(self) -> int | None:
        """How many values there are; None where they are not counted."""
        if self.step is None and not self.is_whole:
            return None
        return round((self.high - self.low) / (self.step or 1)) + 1

    @property
    def ends(self) -> dict[str, float]:
        """The smallest and the largest value by their texts."""
        return {number_text(self.low): self.low, number_text(self.high): self.high}

    def nearest(self, value: float) -> float:
        """The value in whose place a drawn number is used: one with few digits, so that its text can be read."""
        if self.step is not None or self.is_whole:
            step = Decimal(repr(self.step or 1))
            count = round((value - self.low) / float(step))
            exact = Decimal(repr(self.low)) + count * step
            found: float = int(exact) if self.is_whole else float(exact)
        else:
            size = min(self.high - self.low, abs(value)) if self.log else self.high - self.low
            found = round(float(value), _DIGITS - math.floor(math.log10(size))) + 0.0  # no -0.0
        return min(max(found, self.low), self.high)

    def value(self, label: str) -> float:
        """The number that a text stands for; ConfigError unless the range has it."""
        try:
            number: float = int(label) if self.is_whole else float(label)
        except ValueError:
            number = math.nan
        is_there = self.low <= number <= self.high
        if is_there and self.count is not None and not math.isclose(self.nearest(number), number, rel_tol=1e-9):
            is_there = False
        if not is_there:
            raise ConfigError(f"{label!r} is no value of the range {json.dumps(self.described)}")
        return number

    @property
    def described(self) -> dict[str, Any]:
        """As a study file says it."""
        return {key: value for key, value in asdict(self).items() if value is not None and value is not False}


def number_text(value: float) -> str:
    """A number as a label: 1.0e-05, not 1e-05, of which YAML's readers do not agree whether it is a number."""
    text = json.dumps(value)
    return text if "." in text else text.replace("e", ".0e")


def read_range(place: str, given: Any) -> Range:
    """The range that a file describes; ConfigError for what is none."""
    content = require_mapping(place, given, ", ".join(_KEYS))
    require_known(f"{place}.", content, _KEYS)
    for key in ("low", "high"):
        if key not in content:
            raise ConfigError(f"{place}.{key}: missing; expected a number, such as {{low: 1.0e-4, high: 1.0e-2}}")
    numbers = {key: content[key] for key in ("low", "high", "step") if content.get(key) is not None}
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"{place}.{key}: {value!r}; expected a number")
    log = content.get("log", False)
    if not isinstance(log, bool):
        raise ConfigError(f"{place}.log: {log!r}; expected true or false")
    whole = all(isinstance(value, int) for value in numbers.values())
    if not whole:
        numbers = {key: float(value) for key, value in numbers.items()}
    low, high, step = numbers["low"], numbers["high"], numbers.get("step")
    if not low < high or not math.isfinite(high - low):
        raise ConfigError(f"{place}.high: {high!r}; expected more than low, which is {low!r}")
    if whole and max(abs(low), abs(high)) >= _MOST_WHOLE:
        raise ConfigError(f"{place}: {low!r} to {high!r}; expected whole numbers below 2**53")
    if log and low <= 0:
        raise ConfigError(f"{place}.low: {low!r}; with log: true, expected more than 0")
    if step is not None:
        _check_step(place, low, high, step, log)
    return Range(low, high, step, log)


def _check_step(place: str, low: float, high: float, step: float, log: bool) -> None:
    if step <= 0:
        raise ConfigError(f"{place}.step: {step!r}; expected more than 0")
    if log:
        raise ConfigError(f"{place}.step: {step!r}; expected none with log: true, whose steps grow")
    span = Decimal(repr(high)) - Decimal(repr(low))
    rest = span % Decimal(repr(step))
    if rest:
        last = Decimal(repr(high)) - rest
        raise ConfigError(f"{place}.high: {high!r}; expected low and a number of steps, such as {last}")
