"""References in files that describe runs: what `${values.x}` and its like stand for, found and put in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hybridvl.layers.errors import ConfigError
from hybridvl.pipeline.mappings import require_known, require_mapping, yaml_value

_FOLDER_NAME = re.compile(r"[^./\0][^/\0]*")
_REFERENCE = re.compile(r"\$\{(?P<path>name|root|(?:values|stages|axes)\.[^${}]+)\}")


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


def references(value: Any) -> Iterable[str]:
    """The paths of all references in the texts of a value."""
    if isinstance(value, Mapping | list):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from references(entry)
    elif isinstance(value, str):
        yield from (match["path"] for match in _REFERENCE.finditer(value))


def require_value(where: str, path: str, values: Mapping[str, Any]) -> None:
    """Raise ConfigError for a reference to what is not among the values."""
    if path not in values:
        known = ", ".join(f"${{{key}}}" for key in values if key.startswith("values.")) or "none"
        raise ConfigError(f"{where}: ${{{path}}} is not among the values; known are {known}")


def shared_values(content: Mapping[str, Any]) -> dict[str, Any]:
    """Name, root and values of a file by the paths of references to them, with what they say of each other put in.

    {"name": "n", "root": "runs", "values.a": {"b": 1}, "values.a.b": 1}
    """
    given = content.get("values")
    values = require_mapping("values", {} if given is None else given, "names to values")
    shared = {"name": content.get("name"), "root": content.get("root", "runs"), "values": values}
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(shared), resolve=True)
    except OmegaConfBaseException as error:
        place = getattr(error, "full_key", None) or "values"
        raise ConfigError(f"{place}: {str(error).splitlines()[0]}") from error
    assert isinstance(resolved, dict)
    for key in ("name", "root"):
        if not isinstance(resolved[key], str) or not resolved[key]:
            raise ConfigError(f"{key}: {resolved[key]!r}; expected the name of a folder")
    if not _FOLDER_NAME.fullmatch(resolved["name"]):
        raise ConfigError(f"name: {resolved['name']!r}; expected one folder name, without '/' or a leading '.'")
    return flat("values", resolved["values"]) | {"name": resolved["name"], "root": resolved["root"]}


def flat(prefix: str, value: Mapping[Any, Any]) -> dict[str, Any]:
    """{"values.a": {"b": 1}, "values.a.b": 1}: every value, and every mapping of values, by its path."""
    found: dict[str, Any] = {}
    for key, entry in value.items():
        found[f"{prefix}.{key}"] = entry
        if isinstance(entry, Mapping):
            found |= flat(f"{prefix}.{key}", entry)
    return found


def change_shared(content: dict[str, Any], key: str, text: str) -> bool:
    """Put a text in the place of what a file says of its name, root or a value; False for another key."""
    if key in ("name", "root"):
        content[key] = text
        return True
    if not key.startswith("values."):
        return False
    value = yaml_value(key, text)
    node, *parts = content.get("values") or {}, *key.split(".")[1:]
    for part in parts[:-1]:
        require_known("values.", [part], list(node))
        node = require_mapping(key, node[part], "names to values")
    require_known("values.", parts[-1:], [str(name) for name in node])
    node[parts[-1]] = value
    return True
