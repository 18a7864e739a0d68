"""Checkpoint files that are either whole or absent: written aside, flushed to the disk, then renamed."""

from __future__ import annotations

import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from hybridvl.checkpoints.files import write_files
from hybridvl.layers.errors import ConfigError
from hybridvl.training.checkpoints.shards import is_sharded_checkpoint, read_whole


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's plugin for checkpoint files.

    A process killed at any moment, a full disk included, leaves the earlier file of the same name untouched. Files
    are read with `weights_only=True`: tensors and plain containers, no pickled code.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write `checkpoint` to `path`; a full disk or a forbidden folder is a ConfigError, and `path` is as before."""
        path = Path(path)
        try:
            write_files(path.parent, {path.name: partial(_save, checkpoint)})
        except ConfigError as error:
            kept = f"; the earlier {path} is untouched" if path.exists() else ""
            raise ConfigError(f"cannot save the checkpoint {error}{kept}") from error

    def load_checkpoint(
        self, path: str | Path, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint onto the CPU; ConfigError when it is missing, damaged, or holds pickled objects."""
        return read_checkpoint(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint if it is there."""
        if Path(path).is_dir():
            shutil.rmtree(path)
        else:
            Path(path).unlink(missing_ok=True)


def read_checkpoint(path: str | Path, optimizers: bool = True) -> dict[str, Any]:
    """The contents of a checkpoint, on the CPU: a file, or a folder of shards, which are put together.

    optimizers: whether "optimizer_states" are needed; those of a folder are left on the disk if not. ConfigError when
    it is missing, damaged, or holds code.
    """
    path = Path(path)
    if is_sharded_checkpoint(path):
        return read_whole(path, optimizers)
    if not path.is_file():
        raise ConfigError(f"checkpoint {path}: {'a folder, but no checkpoint' if path.is_dir() else 'no such file'}")
    try:
        with warnings.catch_warnings():
            # Said of every pickle that torch did not write; those are refused below if they hold objects.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"checkpoint {path}: holds pickled Python objects or is damaged; only tensors and plain values are loaded"
        ) from error
    except (RuntimeError, EOFError, zipfile.BadZipFile) as error:
        reason = (str(error) or "it ends too early").splitlines()[0]
        raise ConfigError(f"checkpoint {path}: damaged or not a checkpoint ({reason})") from error
    except OSError as error:
        raise ConfigError(f"checkpoint {path}: {error.strerror}") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ConfigError(f"checkpoint {path}: not a training checkpoint (it has no 'state_dict')")
    return checkpoint


class _Sink:
    """A file that remembers the OSError of a failed write, which torch turns into a RuntimeError without a cause."""

    def __init__(self, write: Callable[[Any], int], flush: Callable[[], None]) -> None:
        self._write = write
        self.flush = flush
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._write(data)
        except OSError as error:
            self.error = error
            raise


def _save(checkpoint: dict[str, Any], path: Path) -> None:
    with path.open("wb") as raw:
        sink = _Sink(raw.write, raw.flush)
        try:
            torch.save(checkpoint, sink)  # type: ignore[arg-type]
        except RuntimeError as error:
            if sink.error is not None:
                raise sink.error from error
            raise
