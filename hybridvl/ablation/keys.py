"""Whether the keys that a study sets are keys of its recipe, before any of its runs begins."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from hybridvl.ablation.recipes import merged_recipe
from hybridvl.ablation.study import Study
from hybridvl.layers.errors import ConfigError
from hybridvl.models.config import ModelConfig, VisionConfig
from hybridvl.pipeline.mappings import read_mapping


def check_keys(study: Study, known: Collection[str]) -> None:
    """Raise ConfigError for a key of overrides, an axis or a match that the recipe cannot have.

    Args:
        study: the study.
        known: every key that the command line knows; what lies below one that has no keys of its own, such as the
            options of mixers, is not looked at.
    """
    _check(study, _keys(study), known)


def check_net_keys(study: Study) -> None:
    """The same for keys of model.net alone, for which no command line is needed."""
    known = {f"model.net.{field.name}" for field in dataclasses.fields(ModelConfig)}
    known |= {f"model.net.vision.{field.name}" for field in dataclasses.fields(VisionConfig)}
    _check(study, [(place, key) for place, key in _keys(study) if key.startswith("model.net.")], known)


def _check(study: Study, keys: Iterable[tuple[str, str]], known: Collection[str]) -> None:
    recipe = merged_recipe([read_mapping(path) for path in study.recipes], study.overrides)
    for place, key in keys:
        problem = _problem(key, known, recipe)
        if problem:
            raise ConfigError(f"{study.path}: {place}: {key!r} is no key of the recipe{problem}")


def _keys(study: Study) -> Iterator[tuple[str, str]]:
    """Every key that the study sets, and where."""
    for key in study.overrides:
        yield "overrides", key
    for axis in study.axes:
        if axis.key is not None:
            yield f"axes.{axis.name}.key", axis.key
            continue
        for label, value in axis.values.items():
            yield from ((f"axes.{axis.name}.values.{label}", key) for key in axis.overrides(value))
    for match in study.matches:
        yield from (("match.by", path) for path in match.by)


def _problem(key: str, known: Collection[str], recipe: Mapping[str, Any]) -> str | None:
    """What is wrong with a key, None if nothing is."""
    if key in known:
        return None
    parts = key.split(".")
    above = [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]
    parent = next((path for path in above if path in known), None)
    if parent is None:
        return _nearest(key, known)
    if not any(other.startswith(f"{parent}.") for other in known):
        return _class_problem(key, parent, recipe)
    return _nearest(key, [other for other in known if other.startswith(f"{parent}.")])


def _class_problem(key: str, parent: str, recipe: Mapping[str, Any]) -> str | None:
    """What is wrong with an argument of the class that the recipe names at `parent`."""
    node: Any = recipe
    for name in (*parent.split("."), "class_path"):
        node = node.get(name) if isinstance(node, Mapping) else None
    module, _, name = str(node or "").rpartition(".")
    inner = key.removeprefix(f"{parent}.")
    if not module or inner in ("class_path", "init_args"):
        return None
    try:
        taken = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    except (ImportError, AttributeError, ValueError):
        return None  # the command line will say what is wrong with the class
    argument = inner.removeprefix("init_args.")
    if argument != inner and argument.partition(".")[0] in taken:
        return None
    return _nearest(f"{parent}.init_args.{argument}", [f"{parent}.init_args.{known}" for known in taken])


def _nearest(key: str, known: Collection[str]) -> str:
    parent, _, leaf = key.rpartition(".")
    siblings = {path.rpartition(".")[2]: path for path in known if path.rpartition(".")[0] == parent}
    near = [siblings[name] for name in difflib.get_close_matches(leaf, siblings, n=1)]
    near = near or difflib.get_close_matches(key, known, n=1)
    if near:
        return f", did you mean {near[0]!r}?"
    same = sorted(path for path in known if path.rpartition(".")[2] == leaf)
    if same:
        return f", did you mean {same[0]!r}?"
    return (
        f"; known there are {', '.join(sorted(siblings))}"
        if siblings
        else "; expected a path such as model.net.pattern"
    )
