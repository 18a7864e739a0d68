"""Which Lightning module a recipe trains: `run.stage`, looked up before there is a parser for its settings."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hybridvl.checkpoints import read_config
from hybridvl.layers.errors import ConfigError, within
from hybridvl.training.base import TrainingModule

DEFAULT = "supervised"
STAGES = {
    "supervised": ("hybridvl.training.supervised", "SupervisedTuning"),
    "layers": ("hybridvl.training.layer_distillation", "LayerDistillation"),
    "logits": ("hybridvl.training.logit_distillation", "LogitDistillation"),
}
"""Modules and classes by the name that `run.stage` gives them."""


def stage_name(arguments: Sequence[str], recipes: Iterable[Path]) -> str:
    """What `--run.stage` or else the last recipe with a run.stage says; ConfigError for an unknown one."""
    name = _given("run.stage", arguments, recipes)
    if name is None:
        return DEFAULT
    if not isinstance(name, str) or name not in STAGES:
        raise ConfigError(f"run.stage: {name!r}; expected one of {', '.join(STAGES)}")
    return name


def stage_class(name: str) -> type[TrainingModule]:
    """The module that a stage trains."""
    place, cls = STAGES[name]
    found: type[TrainingModule] = getattr(importlib.import_module(place), cls)
    return found


def net_of_source(arguments: Sequence[str], recipes: Iterable[Path]) -> list[str]:
    """A flag with the configuration of the model in `model.source`, if neither a recipe nor a flag says model.net.

    It goes before the other flags, which may then change single settings of it.
    """
    recipes = list(recipes)
    source = _given("model.source", arguments, recipes)
    if source is None or _given("model.net", arguments, recipes) is not None:
        return []
    with within("model.source"):
        return [f"--model.net={json.dumps(read_config(str(source)).to_dict())}"]


def _given(key: str, arguments: Sequence[str], recipes: Iterable[Path]) -> Any:
    """The value of a key: of the last flag that gives it, else of the last recipe that does; None without any."""
    flag = f"--{key}"
    values = [value for name, value in pairwise(arguments) if name == flag]
    values += [word.partition("=")[2] for word in arguments if word.startswith(f"{flag}=")]
    if values:
        return yaml.safe_load(values[-1])
    found = None
    for recipe in recipes:
        try:
            value = OmegaConf.select(OmegaConf.load(recipe), key)
        except (OSError, yaml.YAMLError, OmegaConfBaseException):
            continue  # the parser will say what is wrong with it
        found = found if value is None else value
    return found
