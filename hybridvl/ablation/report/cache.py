"""What was read of the runs' files, kept from report to report, so that only new and changed files are read again."""

from __future__ import annotations

import contextlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hybridvl.ablation.report.events import CorruptEvents, Curve, read_events
from hybridvl.checkpoints.files import write_files

_FORMAT = 1
_Curves = dict[str, Curve]


@dataclass(frozen=True)
class Content:
    """What a file holds, or why it could not be read.

    Attributes:
        values: of a JSON or YAML file; {} of others.
        curves: of an event file; {} of others.
        problem: why it could not be read; "" if it could.
    """

    values: dict[str, Any]
    curves: _Curves
    problem: str = ""


class Cache:
    """Files read once: a file counts as the same while its path, size and time of change are.

    Args:
        path: where it is kept between reports; None keeps nothing. A file that cannot be read is as good as none.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.read = 0
        self._known: dict[str, tuple[tuple[int, int], Content]] = {}
        self._used: dict[str, tuple[tuple[int, int], Content]] = {}
        if path is not None:
            with contextlib.suppress(OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
                self._known = _load(path)

    def content(self, path: Path) -> Content | None:
        """What a .json, .yaml or event file holds; None where there is no such file."""
        name = str(path)
        if name in self._used:
            return self._used[name][1]
        try:
            facts = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            return Content({}, {}, error.strerror or str(error))
        mark = (facts.st_size, facts.st_mtime_ns)
        known = self._known.get(name)
        if known is None or known[0] != mark:
            known = mark, _read(path)
            self.read += 1
        self._used[name] = known
        return known[1]

    def save(self) -> None:
        """Keep what was used since the start, and only that."""
        if self.path is not None and (self.read or len(self._used) != len(self._known)):
            write_files(self.path.parent, {self.path.name: lambda target: _save(target, self._used)})


def _read(path: Path) -> Content:
    try:
        if path.suffix not in (".json", ".yaml"):
            return Content({}, read_events(path))
        text = path.read_bytes().decode("utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.load(text, _loader())
        # Through JSON, so that a report is the same whether or not a file came from the cache.
        values = json.loads(json.dumps(values, default=str))
    except OSError as error:
        return Content({}, {}, error.strerror or str(error))
    except CorruptEvents as error:
        return Content({}, {}, f"is corrupt: {error}")
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        return Content({}, {}, f"cannot be read: {' '.join(str(error).split())}")
    if not isinstance(values, dict):
        return Content({}, {}, f"holds a {type(values).__name__}; expected a mapping")
    return Content(values, {})


def _loader() -> Any:
    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast where libyaml is there


def _save(target: Path, used: dict[str, tuple[tuple[int, int], Content]]) -> None:
    files: dict[str, Any] = {}
    curves: list[Curve] = []
    for name, (mark, content) in used.items():
        tags = {tag: len(curve.steps) for tag, curve in content.curves.items()}
        curves += content.curves.values()
        files[name] = [mark, content.values, tags, content.problem]
    index = json.dumps({"format": _FORMAT, "files": files}).encode()
    steps = [curve.steps for curve in curves] or [np.zeros(0, np.int64)]
    values = [curve.values for curve in curves] or [np.zeros(0)]
    with target.open("wb") as file:
        np.savez(file, index=np.frombuffer(index, np.uint8), steps=np.concatenate(steps), values=np.concatenate(values))


def _load(path: Path) -> dict[str, tuple[tuple[int, int], Content]]:
    with np.load(path, allow_pickle=False) as stored:
        index = json.loads(stored["index"].tobytes())
        steps, values = stored["steps"], stored["values"]
    if index["format"] != _FORMAT:
        return {}
    known = {}
    at = 0
    for name, ((size, changed), content, tags, problem) in index["files"].items():
        curves = {}
        for tag, count in tags.items():
            curves[tag] = Curve(steps[at : at + count], values[at : at + count])
            at += count
        known[name] = (size, changed), Content(content, curves, problem)
    return known
