"""Axes of a study: what varies, its values by label, and what each value sets in the recipe."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybridvl.ablation.ranges import Range, number_text, read_range
from hybridvl.layers.errors import ConfigError
from hybridvl.pipeline.mappings import require_known, require_mapping, require_path
from hybridvl.pipeline.references import filled, flat, references, require_value

OWN = ("run.root", "run.name", "run.version", "run.labels", "run.metrics", "ckpt_path", "config", "seed_everything")
"""Keys of recipes that a study decides about."""

SAYS = "the study says this itself (its name, root, axes, seeds and metrics)"
_KEYS = ("key", "values", "range")
_NAME_HINT = "expected a name of letters, digits, '_' and '-' that begins with a letter"


@dataclass(frozen=True)
class Axis:
    """One thing that varies.

    Attributes:
        name: of the axis; `${axes.NAME}` is its value in a cell.
        key: the path in the recipe that it sets; None for values that are mappings of paths to values, or that only
            references use.
        values: by label; references to other axes still stand in them. Of a range its ends, see `value`.
        range: the numbers that a search draws from; None for an axis that has values.
    """

    name: str
    key: str | None
    values: Mapping[str, Any]
    range: Range | None = None

    def value(self, label: str) -> Any:
        """What a label stands for."""
        return self.values[label] if self.range is None else self.range.value(label)

    def overrides(self, value: Any) -> dict[str, Any]:
        """What a value of the axis, references put in, sets in the recipe."""
        if self.key is not None:
            return {self.key: value}
        return dict(value) if isinstance(value, Mapping) else {}

    @property
    def keys(self) -> set[str]:
        """All paths that any of its values sets."""
        return {key for value in self.values.values() for key in self.overrides(value)}


def read_axes(described: Any, shared: Mapping[str, Any], users: Iterable[Any]) -> tuple[Axis, ...]:
    """The axes that a study describes.

    Args:
        described: what stands under `axes`.
        shared: values by the paths of references to them.
        users: what else may refer to axes.

    Raises:
        ConfigError: for what is no axis, naming the place.
    """
    content = require_mapping("axes", {} if described is None else described, "names to {key, values}")
    axes = tuple(_axis(name, description, shared) for name, description in content.items())
    used = {path for axis in axes for path in references(axis.values)} | {
        path for user in users for path in references(user)
    }
    for axis in axes:
        if axis.key is None and not any(path == f"axes.{axis.name}" for path in used):
            _require_paths(axis)
    _refuse_circles(axes, shared)
    _refuse_shared_keys(axes)
    return axes


def axis_values(axes: Sequence[Axis], labels: Mapping[str, str]) -> dict[str, Any]:
    """The value of every axis in a cell, references to other axes put in, by the paths of references to them."""
    found: dict[str, Any] = {}
    waiting = list(axes)
    while waiting:
        axis = next(axis for axis in waiting if not _needs(axis, waiting))
        waiting.remove(axis)
        value = filled(axis.value(labels[axis.name]), found)
        found[f"axes.{axis.name}"] = value
        if isinstance(value, Mapping):
            found |= flat(f"axes.{axis.name}", value)
    return found


def require_references(where: str, value: Any, shared: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise ConfigError for a reference to what is neither a shared value nor an axis."""
    for path in references(value):
        if not path.startswith("axes."):
            require_value(where, path, shared)
        elif path.split(".")[1] not in names:
            known = ", ".join(f"${{axes.{name}}}" for name in names) or "none"
            raise ConfigError(f"{where}: ${{{path}}}: no such axis; known are {known}")


def is_excluded(labels: Mapping[str, str], exclude: Iterable[Mapping[str, str]]) -> bool:
    """Whether a cell with these labels by axis, or each that has them among others, has all labels of an entry."""
    return any(entry.items() <= labels.items() for entry in exclude)


def label_of(value: Any) -> str:
    """The label of a value that has none of its own: its text, as YAML writes it."""
    if isinstance(value, float):
        return number_text(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _axis(name: Any, description: Any, shared: Mapping[str, Any]) -> Axis:
    if not isinstance(name, str) or not name[:1].isalpha() or not name.isascii() or not _plain(name):
        raise ConfigError(f"axes: {name!r}; {_NAME_HINT}")
    place = f"axes.{name}"
    description = require_mapping(place, description, "key and values")
    require_known(f"{place}.", description, _KEYS)
    if "range" in description and "values" in description:
        raise ConfigError(f"{place}.range: the axis has values, too; expected one of the two")
    if "range" not in description and "values" not in description:
        raise ConfigError(f"{place}.values: missing; expected a list of values, or a mapping of labels to values")
    key = description.get("key")
    if key is not None:
        require_path(f"{place}.key: {key!r}", key, key, OWN, SAYS)
    if "range" in description:
        numbers = read_range(f"{place}.range", filled(description["range"], shared))
        return Axis(name, key, numbers.ends, numbers)
    given = filled(description["values"], shared)
    axis = Axis(name, key, _labelled(f"{place}.values", given))
    for label, value in axis.values.items():
        where = f"{place}.values.{label}"
        if key is not None:
            require_path(where, key, value, OWN, SAYS)
        elif isinstance(value, Mapping):
            for path, entry in value.items():
                require_path(f"{where}.{path}", path, entry, OWN, SAYS)
    return axis


def _labelled(place: str, given: Any) -> dict[str, Any]:
    """Values by their labels, which are their texts where a list gives none."""
    if not isinstance(given, list | dict):
        raise ConfigError(f"{place}: {given!r}; expected a list of values, or a mapping of labels to values")
    if not given:
        raise ConfigError(f"{place}: {given!r}; an axis needs at least one value")
    pairs = [(label_of(label), value) for label, value in given.items()] if isinstance(given, dict) else []
    if isinstance(given, list):
        for value in given:
            if isinstance(value, Mapping | list) or any(references(value)):
                raise ConfigError(f"{place}: {value!r} has no label; expected a mapping of labels to such values")
            pairs.append((label_of(value), value))
    seen: dict[str, str] = {}
    for label, _ in pairs:
        if not label.strip() or not label.isprintable():
            raise ConfigError(f"{place}: {label!r}; expected a label that can be read")
        if label.casefold() in seen:
            other = seen[label.casefold()]
            same = (
                "given twice" if other == label else f"differs from {other!r} by case alone, which some systems ignore"
            )
            raise ConfigError(f"{place}: {label!r} {same}; expected labels that differ")
        seen[label.casefold()] = label
    return dict(pairs)


def _require_paths(axis: Axis) -> None:
    if axis.range is not None:
        raise ConfigError(
            f"axes.{axis.name}.key: missing; expected the path that the numbers are for, as nothing refers to "
            f"${{axes.{axis.name}}}"
        )
    for label, value in axis.values.items():
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"axes.{axis.name}.values.{label}: {value!r}; expected a mapping of paths to values, as the axis has "
                f"no key and nothing refers to ${{axes.{axis.name}}}"
            )


def _refuse_circles(axes: Sequence[Axis], shared: Mapping[str, Any]) -> None:
    names = [axis.name for axis in axes]
    for axis in axes:
        for label, value in axis.values.items():
            require_references(f"axes.{axis.name}.values.{label}", value, shared, names)
    waiting = list(axes)
    while waiting:
        free = [axis for axis in waiting if not _needs(axis, waiting)]
        if not free:
            circle = ", ".join(axis.name for axis in waiting)
            raise ConfigError(f"axes: {circle}: their values refer to each other in a circle")
        waiting = [axis for axis in waiting if axis not in free]


def _needs(axis: Axis, others: Sequence[Axis]) -> bool:
    """Whether its values refer to any of the others."""
    names = {path.split(".")[1] for path in references(axis.values) if path.startswith("axes.")}
    return any(other.name in names for other in others)


def _refuse_shared_keys(axes: Sequence[Axis]) -> None:
    owners: dict[str, str] = {}
    for axis in axes:
        for key in sorted(axis.keys):
            if key in owners:
                raise ConfigError(
                    f"axes.{axis.name}: sets {key}, which axis {owners[key]!r} sets too; expected one axis"
                )
            owners[key] = axis.name


def _plain(name: str) -> bool:
    return name.replace("-", "_").isidentifier()
