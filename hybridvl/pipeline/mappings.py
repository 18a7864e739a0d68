"""What files that describe runs are made of: mappings read from YAML, known keys, recipes, and flags by path."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hybridvl.checkpoints.files import read_text
from hybridvl.layers.errors import ConfigError, within

_PATH = re.compile(r"[A-Za-z_]\w*(\.\w+)*")


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping, interpolations as they are written."""
    text = read_text(path)
    try:
        content = OmegaConf.to_container(OmegaConf.create(text), resolve=False) if text.strip() else {}
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}; expected YAML") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: {content!r}; expected a mapping of names to values")
    return {str(key): value for key, value in content.items()}


def require_known(place: str, given: Iterable[Any], known: Collection[str]) -> None:
    """Raise ConfigError for a key that is not known, with the nearest one."""
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f", did you mean {near[0]!r}?" if near else f"; known here are {', '.join(known) or 'none'}"
            raise ConfigError(f"{place}{key}: unknown key{hint}")


def require_mapping(place: str, value: Any, what: str) -> dict[Any, Any]:
    """The value if it is a mapping, else a ConfigError that says of what it should be one."""
    if not isinstance(value, dict):
        raise ConfigError(f"{place}: {value!r}; expected a mapping of {what}")
    return value


def require_path(where: str, key: Any, value: Any, own: Collection[str], owner: str) -> None:
    """Raise ConfigError unless key is the path of a value of a recipe that a file may set.

    own: keys of recipes that the file itself decides about; owner: what the file is and by what it decides.
    """
    if not isinstance(key, str) or not _PATH.fullmatch(key):
        raise ConfigError(f"{where}: expected the path of a recipe's value, such as model.optimizer.lr")
    if key in own:
        raise ConfigError(f"{where}: {value!r}; {owner}")
    if "." not in key and isinstance(value, Mapping):
        raise ConfigError(f"{where}: {value!r}; expected paths, such as {key}.{next(iter(value), 'name')}")


def recipe_paths(place: str, value: Any, folder: Path, owner: str) -> tuple[Path, ...]:
    """The recipes that a value names, one or several, which lie beside the file in `folder` and can be read."""
    recipes = value if isinstance(value, list) else [value]
    if not recipes or not all(isinstance(entry, str) and entry for entry in recipes):
        raise ConfigError(f"{place}: {value!r}; expected the name of a recipe beside the {owner}, or several")
    paths = tuple(folder / entry for entry in recipes)
    for path in paths:
        with within(place):
            read_mapping(path)
    return paths


def yaml_value(place: str, text: str) -> Any:
    """The value that a text in YAML stands for, interpolations as they are written."""
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]  # type: ignore
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{place}: {text!r}; expected a value in YAML") from error


def fit_words(recipes: Iterable[Path], overrides: Mapping[str, Any]) -> list[str]:
    """What follows `hybridvl` to fit recipes with values by their paths."""
    files = [word for path in recipes for word in ("--config", str(path))]
    return ["fit", *files, *(f"--{key}={_text(value)}" for key, value in overrides.items())]


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
