"""The tensors in a folder's safetensors files: where each lies, and its values, memory-mapped one at a time."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hybridvl.checkpoints.files import parse_json, read_text
from hybridvl.layers import ConfigError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorFiles:
    """The tensors of model.safetensors, or of the shards that model.safetensors.index.json lists.

    Attributes:
        stored: every tensor of the folder by name, file by file.
        headers: the bytes of every file before its tensors, by file name.
        index: the text of the index, None for a single file.

    Raises ConfigError for missing, damaged and disagreeing files and for pickles, before any tensor is read.
    """

    def __init__(self, folder: Path) -> None:
        self.stored: dict[str, StoredTensor] = {}
        self.headers: dict[str, bytes] = {}
        self._readers: dict[Path, Any] = {}
        listed, self.index = _listed(folder)
        for file in listed:
            self._add(file)
        if self.index is not None:
            _check_index(folder / INDEX, json.loads(self.index)["weight_map"], self.stored)

    def tensor(self, name: str) -> Tensor:
        """A tensor on the CPU, mapped from its file: its values are read when they are used."""
        file = self.stored[name].file
        if file not in self._readers:
            with _explained(file):
                self._readers[file] = safe_open(file, framework="pt")
        with _explained(file):
            tensor: Tensor = self._readers[file].get_tensor(name)
        return tensor

    def release(self) -> None:
        """Unmap the files, except what tensors in use hold on to."""
        self._readers.clear()

    def _add(self, file: Path) -> None:
        with _explained(file):
            safe_open(file, framework="pt")  # checks the header against the file's size
            header = _header(file)
        self.headers[file.name] = header
        for name, entry in json.loads(header[8:]).items():
            if name == "__metadata__":
                continue
            if name in self.stored:
                raise ConfigError(f"{file}: holds {name}, which {self.stored[name].file.name} holds as well")
            if entry["dtype"] not in DTYPES:
                raise ConfigError(f"{file}: {name} has dtype {entry['dtype']}; expected one of {', '.join(DTYPES)}")
            self.stored[name] = StoredTensor(file, tuple(entry["shape"]), DTYPES[entry["dtype"]])


def _listed(folder: Path) -> tuple[list[Path], str | None]:
    """The safetensors files of a folder, and the text of its index if there is one."""
    place = folder / INDEX
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS], None
    if place.is_file():
        text = read_text(place)
        return [folder / name for name in _shards(text, place)], text
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise ConfigError(
            f"{folder}: holds {', '.join(pickles)} but no {WEIGHTS}; pickles can run any code and are never loaded, "
            "expected safetensors"
        )
    raise ConfigError(f"{folder}: holds no weights; expected {WEIGHTS} or {INDEX}")


def weight_files(folder: Path) -> set[str]:
    """Names of whatever belongs to the weights in a folder: all that makes way for another model's."""
    found = {WEIGHTS, INDEX, *(path.name for path in folder.glob("model-*-of-*.safetensors"))}
    with contextlib.suppress(ConfigError):  # no index, or a damaged one, which tells of no further shards
        shards = _shards(read_text(folder / INDEX), folder / INDEX)
        found.update(name for name in shards if Path(name).suffix == ".safetensors")
    return found


def _shards(index: str, place: Path) -> list[str]:
    """The files that an index lists."""
    names = parse_json(index, place).get("weight_map")
    if not isinstance(names, dict) or not all(map(_is_file_name, names.values())):
        raise ConfigError(f"{place}: expected 'weight_map', an object of tensor names to file names")
    return sorted(set(names.values()))


def _is_file_name(value: object) -> bool:
    """Whether a value names a file of the folder that it stands in, and no other place."""
    return isinstance(value, str) and value not in ("", "..") and Path(value).name == value and "\0" not in value


def _header(file: Path) -> bytes:
    with file.open("rb") as stream:
        length = stream.read(8)
        return length + stream.read(int.from_bytes(length, "little"))


def _check_index(place: Path, weight_map: dict[str, str], stored: dict[str, StoredTensor]) -> None:
    """The index and the shards must name the same tensors in the same files."""
    for name, file in weight_map.items():
        if name not in stored:
            raise ConfigError(f"{place}: lists {name} in {file}, which does not hold it")
        if stored[name].file.name != file:
            raise ConfigError(f"{place}: lists {name} in {file}, but {stored[name].file.name} holds it")
    for name, tensor in stored.items():
        if name not in weight_map:
            raise ConfigError(f"{place}: does not list {name}, which {tensor.file.name} holds")


@contextlib.contextmanager
def _explained(file: Path) -> Iterator[None]:
    """Whatever is wrong with a safetensors file is a ConfigError."""
    try:
        yield
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
