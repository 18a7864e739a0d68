"""The file that says what a pipeline is: its name, values shared by its stages, and the stages in order."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hybridvl.checkpoints.files import read_text
from hybridvl.layers.errors import ConfigError, within

_KEYS = ("name", "root", "values", "stages")
_STAGE_KEYS = ("recipe", "overrides")
_RESULTS = ("model", "folder")
# Of the recipe, but said by the pipeline itself.
_OWN = ("run.root", "run.name", "run.version", "ckpt_path", "config")

_FOLDER_NAME = re.compile(r"[^./\0][^/\0]*")
_STAGE_NAME = re.compile(r"[A-Za-z0-9][\w-]*")
_PATH = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
_STAGE_FLAG = re.compile(r"stages\.(?P<stage>[^.]+)\.(?P<key>recipe|overrides\.(?P<path>.+))")
_REFERENCE = re.compile(r"\$\{(?P<path>name|root|(?:values|stages)\.[^${}]+)\}")


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
            _change(content, key, text)
        require_known("", content, _KEYS)
        shared = _resolved(content)
        for key in ("name", "root"):
            if not isinstance(shared[key], str) or not shared[key]:
                raise ConfigError(f"{key}: {shared[key]!r}; expected the name of a folder")
        if not _FOLDER_NAME.fullmatch(shared["name"]):
            raise ConfigError(f"name: {shared['name']!r}; expected one folder name, without '/' or a leading '.'")
        stages: list[Stage] = []
        described = _mapping("stages", content.get("stages"), "stage names to {recipe, overrides}")
        if not described:
            raise ConfigError("stages: none; expected at least one")
        for name, description in described.items():
            earlier = [stage.name for stage in stages]
            stages.append(_stage(name, description, path.parent, shared, earlier, list(described)))
    return Pipeline(shared["name"], Path(shared["root"]), tuple(stages))


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


def filled(value: Any, results: Mapping[str, Any]) -> Any:
    """A value with every reference in its texts replaced: a text that is nothing else becomes what it refers to.

    results: what stands for a reference, by its path; a path that is not there stays as it is.
    """
    if isinstance(value, Mapping):
        return {key: filled(entry, results) for key, entry in value.items()}
    if isinstance(value, list):
        return [filled(entry, results) for entry in value]
    if not isinstance(value, str):
        return value
    whole = _REFERENCE.fullmatch(value)
    if whole is not None:
        return results.get(whole["path"], value)
    return _REFERENCE.sub(lambda match: str(results.get(match["path"], match[0])), value)


def require_known(place: str, given: Iterable[Any], known: Collection[str]) -> None:
    """Raise ConfigError for a key that is not known, with the nearest one."""
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f", did you mean {near[0]!r}?" if near else f"; known here are {', '.join(known) or 'none'}"
            raise ConfigError(f"{place}{key}: unknown key{hint}")


def _stage(
    name: Any, description: Any, folder: Path, shared: Mapping[str, Any], earlier: list[str], names: list[Any]
) -> Stage:
    if not isinstance(name, str) or not _STAGE_NAME.fullmatch(name):
        raise ConfigError(f"stages: {name!r}; expected a name of letters, digits, '_' and '-'")
    place = f"stages.{name}"
    description = _mapping(place, description, "recipe and overrides")
    require_known(f"{place}.", description, _STAGE_KEYS)
    values = _flat("values", shared["values"]) | {"name": shared["name"], "root": shared["root"]}
    recipe = filled(description.get("recipe"), values)
    recipes = recipe if isinstance(recipe, list) else [recipe]
    if not recipes or not all(isinstance(entry, str) and entry for entry in recipes):
        raise ConfigError(f"{place}.recipe: {recipe!r}; expected the name of a recipe beside the pipeline, or several")
    paths = tuple(folder / entry for entry in recipes)
    for path in paths:
        with within(f"{place}.recipe"):
            read_mapping(path)
    needs: dict[str, None] = {}
    overrides: dict[str, Any] = {}
    written = description.get("overrides")
    for key, value in _mapping(f"{place}.overrides", {} if written is None else written, "paths to values").items():
        where = f"{place}.overrides.{key}"
        _check_path(where, key, value)
        for reference in _references(value):
            stage = _checked_reference(where, reference, name, earlier, names, values)
            if stage is not None:
                needs[stage] = None
        overrides[key] = filled(value, values)
    return Stage(name, paths, overrides, tuple(needs))


def _check_path(where: str, key: Any, value: Any) -> None:
    if not isinstance(key, str) or not _PATH.fullmatch(key):
        raise ConfigError(f"{where}: expected the path of a recipe's value, such as model.optimizer.lr")
    if key in _OWN:
        raise ConfigError(f"{where}: {value!r}; the pipeline says this itself (its name, root and stages)")
    if "." not in key and isinstance(value, Mapping):
        raise ConfigError(f"{where}: {value!r}; expected paths, such as {key}.{next(iter(value), 'name')}")


def _checked_reference(
    where: str, path: str, own: str, earlier: list[str], names: list[Any], values: Mapping[str, Any]
) -> str | None:
    """The stage that a reference is about, if any; ConfigError unless there is something that it can mean."""
    if not path.startswith("stages."):
        if path not in values:
            known = ", ".join(f"${{{key}}}" for key in values if key.startswith("values.")) or "none"
            raise ConfigError(f"{where}: ${{{path}}} is not among the values; known are {known}")
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


def _references(value: Any) -> Iterable[str]:
    if isinstance(value, Mapping | list):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _references(entry)
    elif isinstance(value, str):
        yield from (match["path"] for match in _REFERENCE.finditer(value))


def _resolved(content: Mapping[str, Any]) -> dict[str, Any]:
    """Name, root and values, with what they say of each other put in."""
    given = content.get("values")
    values = _mapping("values", {} if given is None else given, "names to values")
    shared = {"name": content.get("name"), "root": content.get("root", "runs"), "values": values}
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(shared), resolve=True)
    except OmegaConfBaseException as error:
        place = getattr(error, "full_key", None) or "values"
        raise ConfigError(f"{place}: {str(error).splitlines()[0]}") from error
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    """{"values.a": {"b": 1}, "values.a.b": 1}: every value, and every mapping of values, by its path."""
    found: dict[str, Any] = {}
    for key, entry in value.items():
        found[f"{prefix}.{key}"] = entry
        if isinstance(entry, Mapping):
            found |= _flat(f"{prefix}.{key}", entry)
    return found


def _change(content: dict[str, Any], key: str, text: str) -> None:
    """Put a value given as text in the place of what the file says."""
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]  # type: ignore
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{key}: {text!r}; expected a value in YAML") from error
    if key in ("name", "root"):
        content[key] = text
        return
    if key.startswith("values."):
        node, *parts = content.get("values") or {}, *key.split(".")[1:]
        for part in parts[:-1]:
            require_known("values.", [part], list(node))
            node = _mapping(key, node[part], "names to values")
        require_known("values.", parts[-1:], [str(name) for name in node])
        node[parts[-1]] = value
        return
    match = _STAGE_FLAG.fullmatch(key)
    if match is None:
        raise ConfigError(
            f"{key}: expected name, root, values.NAME, stages.STAGE.recipe or stages.STAGE.overrides.PATH"
        )
    stages = _mapping("stages", content.get("stages"), "stage names to {recipe, overrides}")
    require_known("stages.", [match["stage"]], list(stages))
    stage = _mapping(f"stages.{match['stage']}", stages[match["stage"]], "recipe and overrides")
    if match["path"] is None:
        stage["recipe"] = value
    else:
        stage["overrides"] = {**(stage.get("overrides") or {}), match["path"]: value}


def _mapping(place: str, value: Any, what: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{place}: {value!r}; expected a mapping of {what}")
    return value
