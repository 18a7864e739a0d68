"""Files and their names: JSON read with clear errors, paths looked up, and several files replaced together."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from hybridvl.layers import ConfigError

_SHOWN = 120  # characters of a path that an error message repeats when the path is too long
_HOST = re.sub(r"[^\w-]", "-", socket.gethostname())
_TEMPORARY = re.compile(r"\..+\.(?P<host>[\w-]+)\.(?P<process>[1-9][0-9]{0,8})\.tmp", re.DOTALL)  # `temporary_path`


def usable_path(path: str | Path) -> Path:
    """A path that the system can look up, whether or not something is there; ConfigError for any other."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        text = str(path)
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"
        raise ConfigError(f"{shown}: {error.strerror}; expected a path that can be opened") from error
    except ValueError as error:
        raise ConfigError(f"{str(path)!r}: {error}; expected a path of characters that names can have") from error
    return Path(path)


def read_text(path: Path) -> str:
    """A UTF-8 file as it is, line ends too; ConfigError if it cannot be read."""
    try:
        return usable_path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error}") from error


def parse_json(text: str, path: Path) -> dict[str, Any]:
    """The object that `text`, read from `path`, holds."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: lists or objects are nested too deeply; expected a few levels") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds a {type(values).__name__}; expected an object")
    return values


def write_files(
    folder: Path, files: Mapping[str, Callable[[Path], object]], stale: Iterable[str] = (), durable: bool = True
) -> None:
    """Replace files of a folder: each is filled by its function under `temporary_path` first, then all get their names.

    The data reach the disk before the names do, unless it is not to be `durable`: then a power cut may leave an empty
    file. `stale` files go last. A name that is a link becomes a file of its own: what the link points to stays as it
    is. Raises ConfigError when anything cannot be written: a full disk, or a folder that has the name of a file, shows
    while no name has changed yet, and all files are as they were. What processes that were killed while they wrote have
    left behind in the folder is removed.
    """
    temporary = {name: temporary_path(folder / name) for name in files}
    stale = list(stale)
    current = folder / next(iter(files))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        for path in (folder / name for name in (*files, *stale)):
            if path.is_dir() and not path.is_symlink():
                raise ConfigError(f"{path}: is a folder; expected a file, or nothing there")
        for name, write in files.items():
            current = folder / name
            write(temporary[name])
            if durable:
                _flush(temporary[name])
        for name, path in temporary.items():
            current = folder / name
            os.replace(path, current)
        for name in stale:
            (folder / name).unlink(missing_ok=True)
        if durable:
            _flush(folder)
    except OSError as error:
        raise ConfigError(f"{current}: cannot be written: {error.strerror or error}") from error
    finally:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                path.unlink()


def write_json(path: Path, content: Mapping[str, Any], durable: bool = True) -> None:
    """Replace a JSON file, see `write_files`; what JSON has no words for becomes its text."""
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n"
    write_files(path.parent, {path.name: text_writer(text)}, durable=durable)


def read_record(path: Path) -> dict[str, Any]:
    """What `write_json` has written; {} where nothing is, or what cannot be read, as a crash may leave it."""
    if not path.is_file():
        return {}
    try:
        return parse_json(read_text(path), path)
    except ConfigError:
        return {}


def temporary_path(path: Path, host: str = _HOST, process: int | None = None) -> Path:
    """Where a process, by default this one, writes a file until it is whole; other hosts may share the folder."""
    return path.with_name(f".{path.name}.{host}.{os.getpid() if process is None else process}.tmp")


def text_writer(text: str) -> Callable[[Path], object]:
    """A function for `write_files` that writes a text."""
    return lambda path: path.write_bytes(text.encode("utf-8"))


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of this host's processes that are no more."""
    for path in folder.iterdir():
        found = _TEMPORARY.fullmatch(path.name)
        if found is not None and found["host"] == _HOST and not _is_running(int(found["process"])):
            with contextlib.suppress(OSError):
                path.unlink()


def _is_running(process: int) -> bool:
    """Whether a process of this number is there, anybody's."""
    try:
        os.kill(process, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
