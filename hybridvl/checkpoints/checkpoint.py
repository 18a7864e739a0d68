"""A checkpoint folder as it lies on the disk: its configuration, and its tensors under our names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridvl.checkpoints.files import read_json
from hybridvl.checkpoints.foreign import translate_config, translate_name
from hybridvl.checkpoints.tensor_files import PICKLES, StoredTensor, TensorFiles
from hybridvl.layers import ConfigError
from hybridvl.models.config import ModelConfig

FORMAT_VERSION = 1
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class Checkpoint:
    """A folder of ours, or of another project's in our terms; nothing is read but config.json and file headers.

    Attributes:
        folder: where it lies.
        config: the model's configuration.
        names: the tensors, under our names.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{folder}: holds no config.json; expected a checkpoint folder")
        self._files = TensorFiles(folder)
        self.config, values = _read_config(folder, list(self._files.stored))
        own = "pattern" in values
        self._theirs = {name if own else translate_name(name, values, str(folder)): name for name in self._files.stored}

    @property
    def names(self) -> list[str]:
        """Our names of all tensors."""
        return list(self._theirs)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, by our name."""
        return self._stored(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Saved dtype of a tensor, by our name."""
        return self._stored(name).dtype

    def tensor(self, name: str) -> Tensor:
        """A tensor on the CPU, by our name, mapped from the file: its values are read when they are used."""
        self._stored(name)
        return self._files.tensor(self._theirs[name])

    def release(self) -> None:
        """Unmap the files, except what tensors in use hold on to."""
        self._files.release()

    def _stored(self, name: str) -> StoredTensor:
        if name not in self._theirs:
            raise ConfigError(f"{self.folder}: holds no tensor {name}")
        return self._files.stored[self._theirs[name]]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint in a folder, or of a Hugging Face hub id ("org/name"); ConfigError for a damaged one."""
    return Checkpoint(checkpoint_folder(path))


def checkpoint_folder(path: str | Path) -> Path:
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.suffix in PICKLES:
        raise ConfigError(f"{path}: pickles are never loaded; expected a folder with safetensors")
    if folder.exists():
        raise ConfigError(f"{path}: is a file; expected a folder with config.json and safetensors")
    if _HUB_ID.fullmatch(str(path)) and not folder.parent.exists():
        return _download(str(path))
    raise ConfigError(f"{path}: no such folder; expected a checkpoint folder or a hub id")


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download  # lazily: only hub ids need it

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors or ValueErrors
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{hub_id}: no such folder, and not to be had from the hub: {reason}") from error


def _read_config(folder: Path, tensor_names: list[str]) -> tuple[ModelConfig, dict[str, Any]]:
    """Our configuration, and what config.json says."""
    place = folder / "config.json"
    values = read_json(place)
    if "pattern" not in values:
        return translate_config(values, tensor_names, str(place)), values
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise ConfigError(f"{place}: format_version {version!r}; expected {FORMAT_VERSION}")
    own = {key: value for key, value in values.items() if key != "format_version"}
    return ModelConfig.from_dict(own, str(place)), values
