"""Claims about the cells of a study, as a YAML file states them: what must be in which range."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybridvl.ablation.axes import label_of
from hybridvl.layers.errors import ConfigError
from hybridvl.pipeline.mappings import require_known, require_mapping

GROWTH = ("growth/state_bytes", "growth/decode_seconds")
_PART_KEYS = ("cell", "than", "metric", "chance", "tokens", "above", "below", "between")
_BOUNDS = "above: NUMBER, below: NUMBER or between: [LOW, HIGH]"


@dataclass(frozen=True)
class Part:
    """A quantity and the range that it is said to be in.

    Attributes:
        cell: labels of the one cell that it is of.
        metric: a logged one, or one of `GROWTH`: the cost after many tokens over that after few.
        low, high: ends of the range, infinite where it is open.
        than: labels of another cell, whose metric is taken off, seed by seed.
        chance: whether what guessing gets is taken off.
        tokens: the few and the many of `GROWTH`; None: the fewest and the most that costs are known for.
    """

    cell: Mapping[str, str]
    metric: str
    low: float
    high: float
    than: Mapping[str, str] | None = None
    chance: bool = False
    tokens: tuple[int, int] | None = None

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


def require_cells(claims: Sequence[Claim], cells: Sequence[Mapping[str, str]], tuned: Collection[str] = ()) -> None:
    """Raise ConfigError for a claim whose labels do not fit exactly one of the cells.

    Args:
        claims: as the study states them.
        cells: labels by axis.
        tuned: axes of which one value stands for all in the report, so that a claim cannot name them.
    """
    left = [{axis: label for axis, label in cell.items() if axis not in tuned} for cell in cells]
    left = [cell for number, cell in enumerate(left) if cell not in left[:number]]
    axes = dict.fromkeys(axis for cell in left for axis in cell)
    for number, claim in enumerate(claims):
        for key, labels in ((key, labels) for part in claim.parts for key, labels in _cells_of(part)):
            place = f"claims[{number}].{key}"
            for axis, label in labels.items():
                if axis in tuned:
                    raise ConfigError(f"{place}.{axis}: the axis is tuned; expected {', '.join(axes) or 'no label'}")
                require_known(f"{place}.", [axis], list(axes))
                known = list(dict.fromkeys(cell[axis] for cell in left))
                if label not in known:
                    names = ", ".join(map(repr, known))
                    raise ConfigError(f"{place}.{axis}: {label!r} is no label of the axis; its labels are {names}")
            fitting = [cell for cell in left if labels.items() <= cell.items()]
            if len(fitting) != 1:
                names = "; ".join(", ".join(f"{axis}: {label}" for axis, label in cell.items()) for cell in fitting[:4])
                raise ConfigError(
                    f"{place}: {dict(labels)} fits {len(fitting)} cells; expected labels that fit one"
                    + (f", such as {names}" if fitting else ", and that is not excluded")
                )


def _cells_of(part: Part) -> list[tuple[str, Mapping[str, str]]]:
    return [("cell", part.cell), *([] if part.than is None else [("than", part.than)])]


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
    if than is not None and metric in GROWTH:
        raise ConfigError(f"{place}.than: {than!r}; {metric} is of one cell: expected a part for each of the two")
    return Part(
        cell=_labels(f"{place}.cell", values.get("cell")),
        metric=metric,
        low=float(low),
        high=float(high),
        than=None if than is None else _labels(f"{place}.than", than),
        chance=chance,
        tokens=_tokens(f"{place}.tokens", values.get("tokens"), metric),
    )


def _tokens(place: str, given: Any, metric: str) -> tuple[int, int] | None:
    if given is None:
        return None
    if metric not in GROWTH:
        raise ConfigError(f"{place}: {given!r}; expected none, as only {' and '.join(GROWTH)} are between two lengths")
    whole = isinstance(given, list) and all(type(number) is int for number in given)
    if not whole or len(given) != 2 or not 1 <= given[0] < given[1]:
        raise ConfigError(f"{place}: {given!r}; expected two numbers of tokens, as [1024, 16384]")
    return given[0], given[1]


def _labels(place: str, given: Any) -> dict[str, str]:
    labels = require_mapping(place, given, "labels to values")
    return {str(key): label_of(value) for key, value in labels.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
