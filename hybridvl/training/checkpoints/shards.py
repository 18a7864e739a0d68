"""Checkpoints as folders: every process writes its shards of weights and optimizer states, the first all the rest."""

from __future__ import annotations

import ctypes
import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable
from functools import reduce
from io import BytesIO
from operator import getitem
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from hybridvl.layers.errors import ConfigError

META = "meta.pt"
"""File of such a folder with all that is not in shards; it is Lightning's name."""

OPTIMIZER = "optimizer_"
"""Beginning of the names under which the states of optimizers lie in shards."""

_INDEX = ".metadata"

# What an index of shards is made of. Nothing else is unpickled.
_INDEX_PARTS = {
    "torch.distributed.checkpoint.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "bfloat16", "float16", "float32", "float64", "int64", "int32", "uint8", "bool"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "Path"},
}

_EXCHANGE = 2  # Linux's flag of renameat2: the two names change places, at no moment is one of them missing
_HERE = -100  # AT_FDCWD


def is_sharded_checkpoint(path: str | Path) -> bool:
    """Whether a path is a folder with a checkpoint in shards."""
    return (Path(path) / _INDEX).is_file() and (Path(path) / META).is_file()


def write_sharded(
    checkpoint: dict[str, Any], path: Path, first: bool, agree: Callable[[str | None], str | None]
) -> None:
    """Write a checkpoint of Lightning's into a folder; all processes must call this.

    The folder gets its name when everything is on the disk. Until then, an earlier one of that name is untouched.

    Args:
        checkpoint: with sharded tensors in "state_dict" and "optimizer_states", which it loses.
        path: the folder.
        first: whether this is the first process.
        agree: gives every process what the first one has put in; who calls it waits for the others.

    Raises:
        ConfigError: the folder cannot be written; in every process.
    """
    aside = path.with_name(f".{path.name}.partial")
    failed = agree(_tried(_prepare, aside) if first else None)
    shards = {"state_dict": checkpoint.pop("state_dict")}
    shards |= {f"{OPTIMIZER}{number}": state for number, state in enumerate(checkpoint.pop("optimizer_states", []))}
    if failed is None:
        failed = _tried(_save, shards, aside)
        if first and failed is None:
            failed = _tried(_finish, checkpoint, aside, path)
        failed = agree(failed)
    if failed is not None:
        kept = f"; the earlier {path} is untouched" if path.exists() else ""
        raise ConfigError(f"cannot save the checkpoint {path}: {failed}{kept}")


def read_meta(path: Path) -> dict[str, Any]:
    """What of a checkpoint's folder is not in shards; ConfigError when it is missing, damaged or holds code."""
    if not is_sharded_checkpoint(path):
        raise ConfigError(f"checkpoint {path}: not a folder of shards (it has no {_INDEX} or no {META})")
    try:
        meta = torch.load(path / META, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, OSError) as error:
        raise ConfigError(f"checkpoint {path / META}: damaged, or it holds pickled Python objects") from error
    if not isinstance(meta, dict):
        raise ConfigError(f"checkpoint {path / META}: holds no checkpoint; expected one that a fit has written")
    return meta


def read_into(shards: dict[str, Any], path: Path) -> None:
    """Fill sharded tensors, and plain values, with those of a folder, whatever the number of processes that wrote it.

    All processes must call this.

    Args:
        shards: nested names as `write_sharded` stores them: "state_dict", "optimizer_0" and so on. Tensors are filled
            in place.
        path: the folder.

    Raises:
        ConfigError: something is missing in the folder, or damaged, or has another shape.
    """
    index = _read_index(path)
    places = {name: place for name, place in index.planner_data.items() if place[0] in shards}
    flat: dict[str, Any] = {}
    for name, place in places.items():
        try:
            flat[name] = reduce(getitem, place, shards)
        except (KeyError, IndexError) as error:
            raise ConfigError(f"checkpoint {path}: {name} is in it, but not in what is trained") from error
    _load(flat, path, no_dist=False)
    for name, place in places.items():
        reduce(getitem, place[:-1], shards)[place[-1]] = flat[name]


def read_whole(path: Path, optimizers: bool = True) -> dict[str, Any]:
    """A folder as the checkpoint that a single process would have written, on the CPU.

    optimizers: whether "optimizer_states" are wanted too.
    """
    checkpoint, index = read_meta(path), _read_index(path)
    flat: dict[str, Any] = {}
    for name, stored in index.state_dict_metadata.items():
        if index.planner_data[name][0] == "state_dict" or optimizers:
            flat[name] = None
            if isinstance(stored, TensorStorageMetadata):
                flat[name] = torch.empty(stored.size, dtype=stored.properties.dtype)
    _load(flat, path, no_dist=True)
    nested: dict[Any, Any] = {}
    for name, value in flat.items():
        *above, last = index.planner_data[name]
        reduce(lambda place, key: place.setdefault(key, {}), above, nested)[last] = value
    checkpoint["state_dict"] = nested.pop("state_dict")
    if optimizers:
        checkpoint["optimizer_states"] = [_numbered(nested[name]) for name in sorted(nested)]
    return checkpoint


class _Planner(DefaultLoadPlanner):
    """Reads plain values without pickled code."""

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


class _Reader(FileSystemReader):
    """Reads the index without pickled code."""

    def read_metadata(self, rank: int | None = None) -> Metadata:
        return _read_index(Path(self.path))


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _INDEX_PARTS.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an index of shards")
        return super().find_class(module, name)


def _read_index(path: Path) -> Metadata:
    try:
        with (path / _INDEX).open("rb") as file:
            index = _IndexUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise ConfigError(f"checkpoint {path / _INDEX}: damaged or not an index of shards ({error})") from error
    if not isinstance(index, Metadata) or not index.planner_data:
        raise ConfigError(f"checkpoint {path / _INDEX}: not an index of shards that a fit has written")
    index.storage_meta = index.storage_meta or StorageMeta()
    return index


def _load(flat: dict[str, Any], path: Path, no_dist: bool) -> None:
    planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # on purpose
            load(flat, storage_reader=_Reader(path), planner=planner, no_dist=no_dist)
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise ConfigError(f"checkpoint {path}: damaged, or of another model ({_first_line(reason)})") from error


def _numbered(state: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimizer by numbers of parameters, as torch's optimizers have it, from one by names."""
    groups = [{**group, "params": list(group["params"])} for _, group in sorted(state["param_groups"].items())]
    names = [name for group in groups for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    for group in groups:
        group["params"] = [numbers[name] for name in group["params"]]
    return {"state": {numbers[name]: entry for name, entry in state.get("state", {}).items()}, "param_groups": groups}


def _prepare(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _save(shards: dict[str, Any], folder: Path) -> None:
    save(shards, storage_writer=FileSystemWriter(folder))


def _finish(rest: dict[str, Any], aside: Path, path: Path) -> None:
    """Write what is in no shards and give the folder its name."""
    with (aside / META).open("wb") as file:
        torch.save(rest, file)
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        _exchange(aside, path)
        if aside.is_dir():
            shutil.rmtree(aside)
        else:
            aside.unlink()
    else:
        os.rename(aside, path)


def _exchange(one: Path, other: Path) -> None:
    """Let two names change places, on Linux without a moment in which one of them is missing."""
    system = ctypes.CDLL(None)
    names = [os.fsencode(path) for path in (one, other)]
    if hasattr(system, "renameat2") and not system.renameat2(_HERE, names[0], _HERE, names[1], _EXCHANGE):
        return
    between = one.with_name(f"{one.name}.old")
    os.rename(other, between)
    os.rename(one, other)
    os.rename(between, one)


def _tried(work: Callable[..., None], *arguments: Any) -> str | None:
    """What went wrong with writing, if anything did."""
    try:
        work(*arguments)
    except OSError as error:
        return error.strerror or str(error)
    except RuntimeError as error:  # torch's for a write that failed
        return _first_line(error)
    except CheckpointException as error:
        return _first_line(next(iter(error.failures.values()))[0])
    return None


def _first_line(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
