"""Tensors in folders of safetensors files: read whole or sharded, written atomically, pickles refused."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hybridvl.layers import ConfigError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors or of the shards that model.safetensors.index.json lists, on the CPU."""
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        tensors |= _read_file(file)
    return tensors


def weight_names(folder: Path) -> list[str]:
    """The names of all tensors in the folder, without reading the tensors."""
    names: list[str] = []
    for file in _weight_files(folder):
        with _opened(file) as reader:
            names += reader.keys()
    return names


def write_weights(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write model.safetensors; a failure leaves an older file as it was."""
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    write_atomically(folder / WEIGHTS, lambda path: save_file(plain, path, metadata={"format": "pt"}))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; anything else is a ConfigError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds a {type(values).__name__}; expected an object")
    return values


def write_json(values: Mapping[str, Any], path: Path) -> None:
    """Write an object as JSON; a failure leaves an older file as it was."""
    text = json.dumps(values, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in the place of `path`.

    The data reach the disk before the name does. Raises ConfigError when that fails; `path` then is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ConfigError(f"{path}: cannot be written: {reason}") from error


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        names = read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
            raise ConfigError(f"{folder / INDEX}: expected 'weight_map', an object of tensor names to file names")
        return [folder / name for name in sorted(set(names.values()))]
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise ConfigError(
            f"{folder}: holds {', '.join(pickles)} but no {WEIGHTS}; pickles can run any code and are never loaded, "
            "expected safetensors"
        )
    raise ConfigError(f"{folder}: holds no weights; expected {WEIGHTS} or {INDEX}")


def _read_file(file: Path) -> dict[str, Tensor]:
    with _opened(file) as reader:
        return {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 - not a mapping


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A reader of a safetensors file; whatever is wrong with the file is a ConfigError."""
    try:
        with safe_open(file, framework="pt") as reader:
            yield reader
    except FileNotFoundError as error:
        raise ConfigError(f"{file}: no such file, though the index lists it") from error
    except (SafetensorError, OSError) as error:
        what = "is a pickle, and pickles are never loaded" if _looks_pickled(file) else "damaged or not safetensors"
        raise ConfigError(f"{file}: {what}; expected safetensors ({error})") from error


def _looks_pickled(file: Path) -> bool:
    """Whether a file that is not safetensors begins like a pickle, or like the zip file that torch.save makes."""
    try:
        with file.open("rb") as stream:
            start = stream.read(4)
    except OSError:
        return False
    return start == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"))


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
