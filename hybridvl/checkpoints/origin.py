"""What a loaded model's files held beyond the model: enough to write them again, byte for byte."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hybridvl.checkpoints.checkpoint import EMBEDDING, Checkpoint
from hybridvl.checkpoints.files import text_writer
from hybridvl.checkpoints.tensor_files import INDEX, StoredTensor
from hybridvl.checkpoints.tensor_writing import make_header, tensors_writer
from hybridvl.models.config import ModelConfig

# What a run may set on a model without the files' configuration becoming wrong.
_FREE_FIELDS: dict[str, Any] = {"activation_checkpointing": False, "init_std": 1.0}


@dataclass(frozen=True)
class Origin:
    """The folder that a model came from: names, shards, metadata and the text of config.json.

    folder, format: of the checkpoint. config, config_text: what config.json says, and how. headers, index: of the
    files. stored: every tensor in its file's order; ours: their names to ours.
    """

    folder: Path
    format: str
    config: ModelConfig
    config_text: str
    headers: dict[str, bytes]
    index: str | None
    stored: dict[str, StoredTensor]
    ours: dict[str, str]

    def fits(self, config: ModelConfig, tensors: Mapping[str, Tensor]) -> bool:
        """Whether a model of this configuration still is one that these files describe."""
        same = dataclasses.replace(config, **_FREE_FIELDS) == dataclasses.replace(self.config, **_FREE_FIELDS)
        shapes = {self.ours[name]: entry.shape for name, entry in self.stored.items()}
        return same and shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def writers(self, tensors: Mapping[str, Tensor]) -> dict[str, Callable[[Path], object]]:
        """A function for `write_files` for every file: the saved bytes again where the tensors are those saved.

        A model that was cast to a wider dtype and not changed is written in the dtype of the files; any other keeps
        its dtypes, and the header, index and configuration say so.
        """
        current = {name: tensors[ours] for name, ours in self.ours.items()}
        kept = all(_holds(current[name], entry.dtype) for name, entry in self.stored.items())
        files: dict[str, Callable[[Path], object]] = {}
        for file, header in self.headers.items():
            held = _in_order(header, current)
            dtypes = [self.stored[name].dtype if kept else tensor.dtype for name, tensor in held.items()]
            metadata = json.loads(header[8:]).get("__metadata__")
            files[file] = tensors_writer(header if kept else make_header(held, metadata), held.values(), dtypes)
        if self.index is not None:
            files[INDEX] = text_writer(self.index if kept else _with_size(self.index, current))
        text = self.config_text if kept else _with_dtype(self.config_text, tensors)
        return {**files, "config.json": text_writer(text)}


def remember_origin(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Keep the origin of a loaded model for as long as the model lives."""
    ours = checkpoint.ours()
    if ours is not None:
        files = checkpoint.files
        _ORIGINS[model] = Origin(
            checkpoint.folder.resolve(),
            checkpoint.format.name,
            checkpoint.config,
            checkpoint.config_text,
            files.headers,
            files.index,
            files.stored,
            ours,
        )


def origin_of(model: nn.Module) -> Origin | None:
    """Where a model was loaded from; None for a model that was built, copied, or cannot be written back as it was."""
    return _ORIGINS.get(model)


_ORIGINS: WeakKeyDictionary[nn.Module, Origin] = WeakKeyDictionary()


def _in_order(header: bytes, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors in the order of their bytes."""
    entries = {name: entry for name, entry in json.loads(header[8:]).items() if name != "__metadata__"}
    return {name: tensors[name] for name in sorted(entries, key=lambda name: entries[name]["data_offsets"])}


def _holds(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor is in this dtype, or in a wider one without using it."""
    if tensor.dtype == dtype:
        return True
    wider = torch.promote_types(tensor.dtype, dtype) == tensor.dtype
    return wider and bool(torch.equal(tensor.to(dtype).to(tensor.dtype), tensor))


def _with_size(index: str, tensors: Mapping[str, Tensor]) -> str:
    values = json.loads(index)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return json.dumps({**values, "metadata": {**(values.get("metadata") or {}), "total_size": size}}, indent=2) + "\n"


def _with_dtype(config_text: str, tensors: Mapping[str, Tensor]) -> str:
    dtype = str(tensors[EMBEDDING].dtype).removeprefix("torch.")

    def replaced(values: dict[str, Any]) -> dict[str, Any]:
        inner = {key: replaced(value) if isinstance(value, dict) else value for key, value in values.items()}
        return {key: dtype if key in ("dtype", "torch_dtype") else value for key, value in inner.items()}

    return json.dumps(replaced(json.loads(config_text)), indent=2) + "\n"
