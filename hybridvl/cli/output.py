"""What commands that print tables and write reports share: a console, and files checked before the work begins."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from hybridvl.checkpoints.files import usable_path
from hybridvl.layers.errors import ConfigError

_PLAIN_WIDTH = 10_000  # columns when the output is a file or a pipe: tables take what they need


def table_console() -> Console:
    """A console as wide as the terminal, or as wide as the tables where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=_PLAIN_WIDTH)


def writable(path: str) -> Path:
    """The path of a file to write, its folder made; ConfigError where no file can be."""
    found = usable_path(path)
    if found.is_dir():
        raise ConfigError(f"{path}: is a folder; expected the name of a file to write")
    try:
        found.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
    return found


def out_folder(path: str) -> Path:
    """The folder of --out, which need not be there; ConfigError where something else is."""
    found = usable_path(path)
    if found.exists() and not found.is_dir():
        raise ConfigError(f"--out: {path}: is a file; expected a folder")
    return found


def write_json(values: object, path: str) -> None:
    """Write values as JSON into a file, or print them where the path is "-"."""
    text = json.dumps(values, indent=2)
    if path == "-":
        print(text)
    else:
        writable(path).write_text(text + "\n", encoding="utf-8")
