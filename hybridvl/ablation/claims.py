"""Claims about the cells of a study, as a YAML file states them: what must be in which range."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hybridvl.ablation.axes import label_of
from hybridvl.layers.errors import ConfigError
from hybridvl.pipeline.mappings import require_known, require_mapping

GROWTH = ("growth/state_bytes", "growth/decode_seconds")
_PART_KEYS = ("cell", "than", "metric", "chance", "above", "below", "between")
_BOUNDS = "above: NUMBER, below: NUMBER or between: [LOW, HIGH]"


@dataclass(frozen=True)
class Part:
    """A quantity and the range that it is said to be in.

    Attributes:
        cell: labels of the one cell that it is of.
        metric: a logged one, or one of `GROWTH`: the cost after the most tokens over that after the fewest.
        low, high: ends of the range, infinite where it is open.
        than: labels of another cell, whose metric is taken off, seed by seed.
        chance: whether what guessing gets is taken off.
    """

    cell: Mapping[str, str]
    metric: str
    low: float
    high: float
    than: Mapping[str, str] | None = None
    chance: bool = False

    @property
    def claimed(self) -> str:
        """The range, for people."""
        if math.isinf(self.low):
            return f"below {self.high:g}"
        return f"above {self.low:g}" if math.isinf(self.high) else f"between {self.low:g} and {self.high:g}"


@dataclass(frozen=True)
class Claim:
    """A sentence, and what must all be so for it to be supported."""

    text: str
    parts: tuple[Part, ...]


def read_claims(given: Any) -> list[Claim]:
    """Claims from what a YAML file holds under `claims`: a list of {claim: TEXT, parts: [...]}, or of a claim's text
    and one part in one mapping.

    Raises:
        ConfigError: naming the place, what stands there and what is accepted.
    """
    if not isinstance(given, list) or not given:
        raise ConfigError(f"claims: {given!r}; expected a list of claims")
    found = []
    for number, entry in enumerate(given):
        place = f"claims[{number}]"
        values = require_mapping(place, entry, "claim and parts")
        require_known(f"{place}.", values, ("claim", "parts", *_PART_KEYS))
        said = values.get("claim")
        if not isinstance(said, str) or not said:
            raise ConfigError(f"{place}.claim: {said!r}; expected a sentence")
        parts = values.get("parts", [{key: value for key, value in values.items() if key != "claim"}])
        if not isinstance(parts, list) or not parts or ("parts" in values and len(values) > 2):
            raise ConfigError(f"{place}.parts: {parts!r}; expected a list of parts, or one part beside the claim")
        places = [f"{place}.parts[{index}]" if "parts" in values else place for index in range(len(parts))]
        found.append(Claim(said, tuple(map(_part, places, parts))))
    return found


def _part(place: str, given: Any) -> Part:
    values = require_mapping(place, given, f"cell, metric and {_BOUNDS}")
    require_known(f"{place}.", values, _PART_KEYS)
    metric = values.get("metric")
    if not isinstance(metric, str) or not metric:
        raise ConfigError(f"{place}.metric: {metric!r}; expected the tag of a metric, or {' or '.join(GROWTH)}")
    chance = values.get("chance", False)
    if not isinstance(chance, bool) or (chance and (values.get("than") is not None or metric in GROWTH)):
        raise ConfigError(
            f"{place}.chance: {chance!r}; expected true or false, and true only for the metric of one cell"
        )
    bounds = [key for key in ("above", "below", "between") if key in values]
    if len(bounds) != 1:
        raise ConfigError(f"{place}: {', '.join(bounds) or 'no range'}; expected one of {_BOUNDS}")
    value = values[bounds[0]]
    ends = value if bounds[0] == "between" else [value, value]
    if not isinstance(ends, list) or len(ends) != 2 or not all(map(_is_number, ends)) or ends[0] > ends[1]:
        raise ConfigError(f"{place}.{bounds[0]}: {value!r}; expected {_BOUNDS}")
    low, high = -math.inf if bounds == ["below"] else ends[0], math.inf if bounds == ["above"] else ends[1]
    than = values.get("than")
    return Part(
        cell=_labels(f"{place}.cell", values.get("cell")),
        metric=metric,
        low=float(low),
        high=float(high),
        than=None if than is None else _labels(f"{place}.than", than),
        chance=chance,
    )


def _labels(place: str, given: Any) -> dict[str, str]:
    labels = require_mapping(place, given, "labels to values")
    return {str(key): label_of(value) for key, value in labels.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
