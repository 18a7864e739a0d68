"""What jsonargparse reports, in one sentence that begins with the mistake and suggests the nearest known key."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from jsonargparse import ArgumentParser

from hybridvl.layers.errors import ConfigError
from hybridvl.models.config import ModelConfig
from hybridvl.pattern import PatternError

_UNKNOWN = (
    re.compile(r"[Uu]nrecognized arguments: --(?P<key>[\w.]+)"),
    re.compile(r"does not accept (?:option|nested key) '(?P<key>[\w.]+)'"),
    re.compile(r"Option '(?P<key>[\w.]+)' is not accepted"),
    re.compile(r"[Kk]ey '(?P<key>[\w.]+)' is not expected"),
)
_CLASS = re.compile(r"a <class '(\w+)'>")
_TYPED = re.compile(r'Parser key "(?P<key>[\w.]+)": (?P<reason>.*)')
_UNION = re.compile(r"Subtypes: \[(?P<kinds>.*?)\] Errors: (?P<errors>.*) Given value: (?P<value>.*)")
_CLASS_PATH = re.compile(r"Problem with given class_path '[^']*': (?P<reason>.*?)(?= - Expected|$)")


def explain(message: str, parser: ArgumentParser, files: Iterable[Path] = (), flags: Iterable[str] = ()) -> str:
    """The message on one line, an unknown key with its whole path and the nearest known one.

    files: the recipes that were read, and flags: the keys on the command line, to find where a key stands when the
    message does not say.
    """
    text = " ".join(message.split())
    for pattern in _UNKNOWN:
        match = pattern.search(text)
        if match:
            return _unknown(match["key"], known_keys(parser), files, flags)
    if text.startswith("Problems parsing config"):
        broken = next((file for file in files if file.exists() and _read(file) is None), None)
        return text if broken is None else f"{broken}: {text}"
    match = _TYPED.search(text)
    if match is None:
        return _CLASS.sub(r"\1", text)
    known = known_keys(parser)
    key = match["key"] if match["key"] in known else _located(match["key"], known, files, flags)
    return _CLASS.sub(r"\1", f"{key}: {_reason(match['reason'])}")


def mistake_behind(error: BaseException | None) -> ConfigError | None:
    """The ConfigError behind an error: where a type is optional, jsonargparse wraps what the constructor raised."""
    while error is not None and not isinstance(error, ConfigError):
        error = error.__cause__ or error.__context__
    return error


def with_path(error: ConfigError) -> str:
    """The message with the path of the recipe's section in front, where a part of the model only knows its own name."""
    message = str(error)
    if isinstance(error, PatternError):
        return f"model.net.pattern: {message}"
    root = re.match(r"(\w+)(?=[.:]| =)", message)
    if root and root[1] in {field.name for field in dataclasses.fields(ModelConfig)}:
        return f"model.net.{message}"
    return f"data.{message}" if root and root[1] == "images" else message


def known_keys(parser: ArgumentParser) -> set[str]:
    """Every key of the parser, the fields of optional dataclasses included."""
    keys: set[str] = set()
    for action in parser._actions:
        keys.add(action.dest)
        keys |= {f"{action.dest}.{field}" for field in _fields(getattr(action, "_typehint", None))}
    return {key for key in keys if key.split(".")[-1] != "help" and ".help." not in key}


def _reason(reason: str) -> str:
    """Why a value does not fit: of several types that are accepted, the value and their names."""
    union = _UNION.search(reason)
    if not union:
        return reason
    value = "null" if union["value"] == "None" else union["value"]
    problem = _CLASS_PATH.search(union["errors"])
    if problem:
        return f"{value}: {problem['reason']}"
    kinds = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", union["kinds"])
    kinds = re.sub(r"\b(?:\w+\.)+(?=\w)", "", kinds).replace("NoneType", "null")
    return f"{value}; expected one of {kinds}" + (" (a class by its import path)" if "import path" in reason else "")


def _unknown(key: str, known: set[str], files: Iterable[Path], flags: Iterable[str]) -> str:
    if "." not in key:
        key = next((path for path in _candidates(key, files, flags) if path not in known), key)
    parent, _, leaf = key.rpartition(".")
    taken = _parameters(parent.removesuffix(".init_args"), files)
    known = {f"{parent}.{name}" for name in taken} or known
    siblings = {path.rpartition(".")[2]: path for path in known if path.rpartition(".")[0] == parent}
    near = difflib.get_close_matches(leaf, siblings, n=1)
    if near:
        return f"{key}: unknown key, did you mean {siblings[near[0]]!r}?"
    near = [] if parent in known else difflib.get_close_matches(key, known, n=1)
    if near:
        return f"{key}: unknown key, did you mean {near[0]!r}?"
    return f"{key}: unknown key" + (f"; known here are {', '.join(sorted(siblings))}" if siblings else "")


def _located(key: str, known: set[str], files: Iterable[Path], flags: Iterable[str]) -> str:
    """The whole path of a known key; the key as it is where it stands nowhere, or in several places."""
    paths = {path for path in _candidates(key, files, flags) if path in known}
    return paths.pop() if len(paths) == 1 else key


def _candidates(key: str, files: Iterable[Path], flags: Iterable[str]) -> list[str]:
    """Paths that end with a key, on the command line and in the recipes: some messages name the last part alone."""
    given = [*flags, *(path for file in files for path in _paths(_read(file), ""))]
    return [path for path in given if path.rpartition(".")[2] == key]


def _parameters(section: str, files: Iterable[Path]) -> list[str]:
    """What the class that a recipe names as `section`.class_path takes."""
    for file in files:
        node = _read(file)
        for name in (*section.split("."), "class_path"):
            node = node.get(name) if isinstance(node, Mapping) else None
        module, _, attribute = str(node or "").rpartition(".")
        if module:
            return [*inspect.signature(getattr(importlib.import_module(module), attribute)).parameters]
    return []


def _fields(hint: Any) -> Iterator[str]:
    for kind in (hint, *get_args(hint)):
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from (field.name for field in dataclasses.fields(kind))


def _read(file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return None


def _paths(content: Any, prefix: str) -> Iterator[str]:
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield f"{prefix}{key}"
            yield from _paths(value, f"{prefix}{key}.")
