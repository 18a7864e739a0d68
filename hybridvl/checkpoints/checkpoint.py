"""A checkpoint folder as it lies on the disk: its configuration, and its tensors under our names."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridvl.checkpoints.files import parse_json, read_text, usable_path
from hybridvl.checkpoints.formats import Format, find_format
from hybridvl.checkpoints.formats.native import FORMAT_VERSION
from hybridvl.checkpoints.tensor_files import PICKLES, TensorFiles
from hybridvl.layers.errors import ConfigError, within
from hybridvl.models.config import ModelConfig

__all__ = [
    "EMBEDDING",
    "FORMAT_VERSION",
    "HEAD",
    "Checkpoint",
    "checkpoint_folder",
    "is_hub_id",
    "open_checkpoint",
    "read_config",
]

HEAD, EMBEDDING = "lm_head.weight", "decoder.embed_tokens.weight"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class _Entry:
    """One of our tensors: which of theirs it comes from, and how."""

    theirs: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[Tensor], Tensor] | None = None


class Checkpoint:
    """A folder of ours, or of another project's in our terms; nothing is read but config.json and file headers.

    Attributes:
        folder: where it lies.
        config: the model's configuration.
        config_text: config.json as it is.
        format: whose folder it is.
        files: the tensors as they lie in the files.
        names: the tensors, under our names; what the format has no place for keeps its own name.
        tied_head: the files' name of a head that is stored although it is tied to the embedding; not among `names`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config_text, values, self.format = _open_config(folder)
        self.config = _configuration(self.format, values, folder)
        self.files = TensorFiles(folder)
        self._entries: dict[str, _Entry] = {}
        for theirs in self.files.stored:
            self._add(theirs)
        self.tied_head: str | None = None
        if self.config.tie_embeddings and HEAD in self._entries:
            self.tied_head = self._entries.pop(HEAD).theirs

    @property
    def names(self) -> list[str]:
        """Our names of all tensors."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, by our name."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Saved dtype of a tensor, by our name."""
        return self._entry(name).dtype

    def tensor(self, name: str) -> Tensor:
        """A tensor on the CPU, by our name, mapped from the file: its values are read when they are used."""
        entry = self._entry(name)
        tensor = self.files.tensor(entry.theirs)
        return tensor if entry.make is None else entry.make(tensor)

    def spelled(self, name: str) -> str:
        """What the files call one of our tensors, or would."""
        return self._entries[name].theirs if name in self._entries else self.format.theirs(name)

    def ours(self) -> dict[str, str] | None:
        """Our name of every tensor of the files; None if some are not the same tensors as ours."""
        if any(entry.make is not None for entry in self._entries.values()):
            return None
        head = {} if self.tied_head is None else {self.tied_head: EMBEDDING}
        return {entry.theirs: name for name, entry in self._entries.items()} | head

    def release(self) -> None:
        """Unmap the files, except what tensors in use hold on to."""
        self.files.release()

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise ConfigError(f"{self.folder}: holds no tensor {name}")
        return self._entries[name]

    def _add(self, theirs: str) -> None:
        stored = self.files.stored[theirs]
        pieces = self.format.pieces(self.config, theirs)
        for piece in pieces:
            if stored.shape != piece.whole:
                raise ConfigError(f"{stored.file}: {theirs} has shape {stored.shape}, expected {piece.whole}")
            made = piece.make(torch.empty(stored.shape, dtype=stored.dtype, device="meta"))
            self._place(piece.ours, _Entry(theirs, tuple(made.shape), made.dtype, piece.make))
        if not pieces:
            self._place(self.format.ours(theirs) or theirs, _Entry(theirs, stored.shape, stored.dtype))

    def _place(self, name: str, entry: _Entry) -> None:
        if name in self._entries:
            raise ConfigError(f"{self.folder}: {self._entries[name].theirs} and {entry.theirs} are the same tensor")
        self._entries[name] = entry


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint in a folder, or of a Hugging Face hub id ("org/name"); ConfigError for a damaged one."""
    return Checkpoint(checkpoint_folder(path))


def read_config(path: str | Path) -> ModelConfig:
    """The configuration of the model in a folder, from config.json and, where that leaves it open whether the head is
    tied, the tensors' names."""
    folder = checkpoint_folder(path)
    _, values, format = _open_config(folder)
    return _configuration(format, values, folder)


def checkpoint_folder(path: str | Path) -> Path:
    """A folder that is there, or that the hub's files are in; ConfigError says how to get them."""
    folder = usable_path(path)
    if folder.is_dir():
        return folder
    if folder.suffix in PICKLES:
        raise ConfigError(f"{path}: pickles are never loaded; expected a folder with safetensors")
    if folder.exists():
        raise ConfigError(f"{path}: is a file; expected a folder with config.json and safetensors")
    if is_hub_id(path):
        return _download(str(path))
    raise ConfigError(f"{path}: no such folder; expected a checkpoint folder or a hub id")


def is_hub_id(path: str | Path) -> bool:
    """Whether a path that is no folder here names a model of the hub."""
    folder = usable_path(path)
    return _HUB_ID.fullmatch(str(path)) is not None and not folder.exists() and not folder.parent.exists()


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download  # lazily: only hub ids need it

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]))
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors or ValueErrors
        reason = str(error).strip().splitlines()[0].rstrip(".")
        local = hub_id.split("/")[1]
        raise ConfigError(
            f"{hub_id}: no such folder, and not to be had from the hub: {reason}; where there is a network, run "
            f"`hf download {hub_id} --local-dir {local}`, then give the folder {local}"
        ) from error


def _open_config(folder: Path) -> tuple[str, dict[str, Any], Format]:
    """config.json as text and as values, and the format that it is in."""
    place = folder / "config.json"
    if not place.is_file():
        raise ConfigError(f"{folder}: holds no config.json; expected a checkpoint folder")
    text = read_text(place)
    values = parse_json(text, place)
    return text, values, find_format(values, str(place))


def _configuration(format: Format, values: dict[str, Any], folder: Path) -> ModelConfig:
    place = str(folder / "config.json")
    with within(place):
        tied = format.read_tied(values)
    if tied is None:
        tied = all(format.ours(name) != HEAD for name in TensorFiles(folder).stored)
    return format.config(values, tied, place)
