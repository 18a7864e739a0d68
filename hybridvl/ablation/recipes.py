"""The recipe of a cell: files and overrides joined as `hybridvl fit` joins them, and the model that it describes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hybridvl.checkpoints.checkpoint import is_hub_id, read_config
from hybridvl.conversion.target import target_config
from hybridvl.layers.errors import ConfigError, within
from hybridvl.models.config import ModelConfig
from hybridvl.pattern import PatternError, parse_pattern


class Elsewhere(ConfigError):
    """A model that is on a hub, and is not fetched for its configuration."""


# What a later file or a flag gives as a whole; of other mappings it changes what it names.
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
    section: Any = recipe
    for key in path.split("."):
        section = section.get(key) if isinstance(section, Mapping) else None
    if "${" not in json.dumps(section, default=str):
        return section  # OmegaConf takes long to wrap a whole recipe
    try:
        found = OmegaConf.select(OmegaConf.create(dict(recipe)), path)
        return OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from error


def recipe_model(recipes: Sequence[Mapping[str, Any]], overrides: Mapping[str, Any]) -> ModelConfig:
    """The model that is trained: of model.net, of model.source, or the student of model.student.

    Raises:
        ConfigError: a mistake in it, or a teacher or source that is no folder.
        Elsewhere: its teacher or source is on a hub.
    """
    recipe = merged_recipe(recipes, overrides)
    stage = resolved_section(recipe, "run.stage") or "supervised"
    if stage != "supervised":
        return _student(resolved_section(recipe, "model.student"))
    net = resolved_section(recipe, "model.net")
    source = resolved_section(recipe, "model.source")
    # As for a fit, single values of model.net change what the source says, and a section of it takes its place.
    if source is not None and "model.net" not in overrides:
        given = resolved_section(merged_recipe(recipes, {}), "model.net")
        net = _join(_config("model.source", source).to_dict(), net or {}, "model.net.") if given is None else net
    if net is None:
        raise ConfigError("model.net: missing; expected the sizes of a model there, or a folder as model.source")
    model = ModelConfig.from_dict(net, "model.net")
    with within("model.net.pattern"):
        parse_pattern(model.pattern, model.mixers)
    return model


def recipe_context(recipe: Mapping[str, Any]) -> int | None:
    """Tokens of the longest conversation, data.max_tokens; None where the recipe leaves it open."""
    found = resolved_section(recipe, "data.max_tokens")
    return found if isinstance(found, int) else None


def recipe_dtype(recipe: Mapping[str, Any]) -> torch.dtype:
    """The dtype in which the trained model is run, by trainer.precision."""
    precision = str(resolved_section(recipe, "trainer.precision") or "")
    names = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
    return next((dtype for name, dtype in names.items() if precision.startswith(name)), torch.float32)


def _student(student: Any) -> ModelConfig:
    values = student if isinstance(student, Mapping) else {}
    for key in ("teacher", "pattern"):
        if not isinstance(values.get(key), str):
            raise ConfigError(f"model.student.{key}: {values.get(key)!r}; expected text")
    teacher = _config("model.student.teacher", values["teacher"])
    with within("model.student"):
        return target_config(teacher, values["pattern"], values.get("mixers"), "mixers")


def _config(place: str, folder: Any) -> ModelConfig:
    """The configuration of a model in a folder."""
    if is_hub_id(str(folder)):
        raise Elsewhere(f"{place}: {folder} is on a hub; what its students cost is known once it is a folder here")
    with within(place):
        return read_config(str(folder))


def _join(below: Mapping[str, Any], above: Mapping[str, Any], place: str, flag: str = "") -> dict[str, Any]:
    """Two mappings, of which the second wins; `flag` is the path of the single value that it holds, if it is one."""
    joined = dict(below)
    for key, value in above.items():
        path = f"{place}{key}"
        whole = path in _WHOLE and not flag.startswith(f"{path}.")
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
