"""The trained model as a folder of its own, beside the checkpoints: `hybridvl.load(run / "model")` takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer

from hybridvl.models.checkpoints import save
from hybridvl.training.supervised import SupervisedTuning


@runtime_checkable
class SavesProcessor(Protocol):
    """A data module that can write its tokenizer and image settings into a folder."""

    def save_processor(self, folder: Path) -> None:
        """Write the files."""


class ExportModel(Callback):
    """Writes model/ into the run folder when the fit ends: configuration, safetensors, tokenizer, image settings."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it, once."""
        if not isinstance(pl_module, SupervisedTuning) or not trainer.is_global_zero or trainer.fast_dev_run:
            return
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "model"
        save(pl_module.net, folder)
        datamodule = getattr(trainer, "datamodule", None)
        if isinstance(datamodule, SavesProcessor):
            datamodule.save_processor(folder)
