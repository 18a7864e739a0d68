"""The file that says what a pipeline is: its name, values shared by its stages, and the stages in order."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridvl.layers.errors import ConfigError, within
from hybridvl.pipeline.mappings import (
    read_mapping,
    recipe_paths,
    require_known,
    require_mapping,
    require_path,
    yaml_value,
)
from hybridvl.pipeline.references import change_shared, filled, references, require_value, shared_values

_KEYS = ("name", "root", "values", "stages")
_STAGE_KEYS = ("recipe", "overrides")
_RESULTS = ("model", "folder")
# Of the recipe, but said by the pipeline itself.
_OWN = ("run.root", "run.name", "run.version", "ckpt_path", "config")

_STAGE_NAME = re.compile(r"[A-Za-z0-9][\w-]*")
_STAGE_FLAG = re.compile(r"stages\.(?P<stage>[^.]+)\.(?P<key>recipe|overrides\.(?P<path>.+))")


@dataclass(frozen=True)
class Stage:
    """One fit.

    Attributes:
        name: of the stage, and of the folder of its runs.
        recipes: files given to `hybridvl fit` with --config; of several the later wins.
        overrides: values by path, as flags of `hybridvl fit`; `${stages.NAME.model}` still stands in them.
        needs: the stages that the overrides refer to.
    """

    name: str
    recipes: tuple[Path, ...]
    overrides: Mapping[str, Any]
    needs: tuple[str, ...]


@dataclass(frozen=True)
class Pipeline:
    """Stages in the order in which they run; their runs lie in `folder`/STAGE/VERSION."""

    name: str
    root: Path
    stages: tuple[Stage, ...]

    @property
    def folder(self) -> Path:
        """Where the runs of all stages lie."""
        return self.root / self.name


def read_pipeline(path: Path, changes: Mapping[str, str] | None = None) -> Pipeline:
    """The pipeline that a YAML file describes.

    Args:
        path: the file; recipes are looked up beside it.
        changes: YAML text by path in the file, such as {"values.seed": "1"}, in place of what the file says.

    Raises:
        ConfigError: naming the file, the place in it, what stands there and what is accepted.
    """
    content = read_mapping(path)
    with within(str(path)):
        for key, text in (changes or {}).items():
            if not change_shared(content, key, text):
                _change_stage(content, key, text)
        require_known("", content, _KEYS)
        shared = shared_values(content)
        stages: list[Stage] = []
        described = require_mapping("stages", content.get("stages"), "stage names to {recipe, overrides}")
        if not described:
            raise ConfigError("stages: none; expected at least one")
        for name, description in described.items():
            earlier = [stage.name for stage in stages]
            stages.append(_stage(name, description, path.parent, shared, earlier, list(described)))
    return Pipeline(shared["name"], Path(shared["root"]), tuple(stages))


def _stage(
    name: Any, description: Any, folder: Path, values: Mapping[str, Any], earlier: list[str], names: list[Any]
) -> Stage:
    if not isinstance(name, str) or not _STAGE_NAME.fullmatch(name):
        raise ConfigError(f"stages: {name!r}; expected a name of letters, digits, '_' and '-'")
    place = f"stages.{name}"
    description = require_mapping(place, description, "recipe and overrides")
    require_known(f"{place}.", description, _STAGE_KEYS)
    paths = recipe_paths(f"{place}.recipe", filled(description.get("recipe"), values), folder, "pipeline")
    needs: dict[str, None] = {}
    overrides: dict[str, Any] = {}
    given = description.get("overrides")
    written = require_mapping(f"{place}.overrides", {} if given is None else given, "paths to values")
    for key, value in written.items():
        where = f"{place}.overrides.{key}"
        require_path(where, key, value, _OWN, "the pipeline says this itself (its name, root and stages)")
        for reference in references(value):
            stage = _checked_reference(where, reference, name, earlier, names, values)
            if stage is not None:
                needs[stage] = None
        overrides[key] = filled(value, values)
    return Stage(name, paths, overrides, tuple(needs))


def _checked_reference(
    where: str, path: str, own: str, earlier: list[str], names: list[Any], values: Mapping[str, Any]
) -> str | None:
    """The stage that a reference is about, if any; ConfigError unless there is something that it can mean."""
    if not path.startswith("stages."):
        require_value(where, path, values)
        return None
    stage, _, result = path.removeprefix("stages.").partition(".")
    accepted = f"expected an earlier stage: {', '.join(earlier)}" if earlier else "no stage comes before this one"
    if stage == own:
        raise ConfigError(f"{where}: ${{{path}}} refers to the stage itself; {accepted}")
    if stage not in earlier:
        what = "comes later" if stage in names else "is no stage"
        raise ConfigError(f"{where}: ${{{path}}}: {stage!r} {what}; {accepted}")
    if result not in _RESULTS:
        known = " or ".join(f"${{stages.{stage}.{name}}}" for name in _RESULTS)
        raise ConfigError(f"{where}: ${{{path}}}; expected {known}")
    return stage


def _change_stage(content: dict[str, Any], key: str, text: str) -> None:
    """Put a value given as text in the place of what the file says of a stage."""
    value = yaml_value(key, text)
    match = _STAGE_FLAG.fullmatch(key)
    if match is None:
        raise ConfigError(
            f"{key}: expected name, root, values.NAME, stages.STAGE.recipe or stages.STAGE.overrides.PATH"
        )
    stages = require_mapping("stages", content.get("stages"), "stage names to {recipe, overrides}")
    require_known("stages.", [match["stage"]], list(stages))
    stage = require_mapping(f"stages.{match['stage']}", stages[match["stage"]], "recipe and overrides")
    if match["path"] is None:
        stage["recipe"] = value
    else:
        stage["overrides"] = {**(stage.get("overrides") or {}), match["path"]: value}
