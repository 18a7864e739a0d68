"""Flags for single options of mixers, which jsonargparse alone would let replace all the other options."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from hybridvl.cli.arguments import take_flags
from hybridvl.layers.errors import ConfigError

_OPTION = r"\.(?P<mixer>\w+)\.(?P<option>\w+)(?:=(?P<value>.*))?"
_RECIPE_FLAG = re.compile(r"--model\.(?P<owner>net|student)\.mixers" + _OPTION, re.DOTALL)
_FLAG = re.compile(r"--mixer" + _OPTION, re.DOTALL)


def merge_mixer_flags(arguments: Sequence[str], recipes: Iterable[Path]) -> list[str]:
    """The arguments with every `--model.net.mixers.NAME.OPTION VALUE`, and every one of model.student, joined to what
    the recipes say of NAME.

    Each becomes `--model.net.mixers.NAME={...}` with the options of the last recipe that has mixers, and the flags';
    those of model.student, which may be null, become `--model.student.mixers={...}`.
    """
    recipes = list(recipes)
    options = {owner: _mixers(recipes, owner) for owner in ("net", "student")}
    merged: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        match = _RECIPE_FLAG.fullmatch(argument)
        if match is None:
            merged.append(argument)
            continue
        owner, name = match["owner"], match["mixer"]
        value = match["value"] if match["value"] is not None else next(waiting, "")
        options[owner].setdefault(name, {})[match["option"]] = yaml.safe_load(value)
        if owner == "net":
            merged.append(f"--model.net.mixers.{name}={json.dumps(options[owner][name])}")
        else:
            merged.append(f"--model.student.mixers={json.dumps(options[owner])}")
    return merged


def take_mixer_flags(arguments: Sequence[str]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """The arguments without every `--mixer.NAME.OPTION VALUE`, and those options by mixer; for commands whose other
    arguments argparse reads. ConfigError for a flag without a value or with one that is not YAML."""
    rest, flags = take_flags(arguments, _FLAG)
    options: dict[str, dict[str, Any]] = {}
    for flag, value in flags:
        try:
            options.setdefault(flag["mixer"], {})[flag["option"]] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{flag[0]} {value!r}: not valid YAML") from error
    return rest, options


def _mixers(recipes: Iterable[Path], owner: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for recipe in recipes:
        try:
            node = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            continue  # the parser will say what is wrong with it
        for key in ("model", owner, "mixers"):
            node = node.get(key) if isinstance(node, dict) else None
        if isinstance(node, dict):
            found = {name: dict(options) for name, options in node.items() if isinstance(options, dict)}
    return found
