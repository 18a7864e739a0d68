"""The trained model as a folder of its own, beside the checkpoints: `hybridvl.load(run / "model")` takes it."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from hybridvl.checkpoints import save
from hybridvl.data.module import ChatDataModule
from hybridvl.inference.processor import Processor
from hybridvl.training.base import TrainingModule
from hybridvl.training.callbacks.checkpoints import Checkpoints
from hybridvl.training.lora import ADAPTER_FOLDER
from hybridvl.training.processes.sharding import put_together
from hybridvl.training.supervised import SupervisedTuning
from hybridvl.training.trainer import is_dry_run, run_folder


class ExportModel(Callback):
    """Writes model/ into the run folder when the fit ends: configuration, safetensors, tokenizer, image settings.

    Adapters are merged into it; adapter/ has them alone.
    """

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it, once."""
        for keeper in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(keeper, Checkpoints):
                keeper.take_best(trainer)  # a fit that was resumed at its last step has not come to the end of training
        if not isinstance(pl_module, TrainingModule) or is_dry_run(trainer):
            return
        with put_together(pl_module.net, keep=trainer.is_global_zero):
            if trainer.is_global_zero:
                self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: TrainingModule) -> None:
        folder = run_folder(trainer) / "model"
        adapters = pl_module.adapters if isinstance(pl_module, SupervisedTuning) else None
        if adapters is not None:
            adapters.save(run_folder(trainer) / ADAPTER_FOLDER)
        save(pl_module.net if adapters is None else adapters.merged(), folder)
        datamodule = getattr(trainer, "datamodule", None)
        if isinstance(datamodule, ChatDataModule):
            Processor(datamodule.chat, datamodule.images, datamodule.videos).save(folder)
