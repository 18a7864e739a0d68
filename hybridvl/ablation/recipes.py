"""The recipe of a cell: files and overrides joined as `hybridvl fit` joins them, and the model that it describes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hybridvl.layers.errors import ConfigError
from hybridvl.pattern import PatternError, parse_pattern

# What a later file or a flag gives as a whole.
_WHOLE = ("model.net.mixers", "model.student.mixers")


def merged_recipe(recipes: Sequence[Mapping[str, Any]], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What recipes, of which the later wins, and values by path come to; interpolations as they are written."""
    merged: dict[str, Any] = {}
    for recipe in recipes:
        merged = _join(merged, recipe, "")
    for path, value in overrides.items():
        *parents, leaf = path.split(".")
        entry: Any = {leaf: value}
        for parent in reversed(parents):
            entry = {parent: entry}
        merged = _join(merged, entry, "", path)
    return merged


def same_recipe(recipe: Mapping[str, Any]) -> str:
    """A text that is equal for recipes that are the same, however their patterns are written."""
    return json.dumps(_canonical(recipe), sort_keys=True, default=str)


def resolved_section(recipe: Mapping[str, Any], path: str) -> Any:
    """A section of a recipe with its interpolations put in; None if there is none."""
    try:
        found = OmegaConf.select(OmegaConf.create(dict(recipe)), path)
        return OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from error


def _join(below: Mapping[str, Any], above: Mapping[str, Any], place: str, flag: str = "") -> dict[str, Any]:
    """Two mappings, of which the second wins; `flag` is the path of a single value that it holds."""
    joined = dict(below)
    for key, value in above.items():
        path = f"{place}{key}"
        whole = path == flag or (path in _WHOLE and not flag.startswith(f"{path}."))
        if isinstance(value, Mapping) and isinstance(joined.get(key), Mapping) and not whole:
            joined[key] = _join(joined[key], value, f"{path}.", flag)
        else:
            joined[key] = value
    return joined


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _pattern(entry) if key == "pattern" else _canonical(entry) for key, entry in value.items()}
    return [_canonical(entry) for entry in value] if isinstance(value, list) else value


def _pattern(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return str(parse_pattern(value))
    except PatternError:
        return value  # the fit will say what is wrong with it
