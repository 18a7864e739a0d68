"""Model weights written as one safetensors file, atomically."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from hybridvl.checkpoints.files import write_atomically
from hybridvl.checkpoints.tensor_files import WEIGHTS


def write_weights(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write model.safetensors; a failure leaves an older file as it was."""
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    write_atomically(folder / WEIGHTS, lambda path: save_file(plain, path, metadata={"format": "pt"}))
