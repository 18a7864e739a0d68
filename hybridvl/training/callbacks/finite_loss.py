"""A fit whose loss or gradient is no number stops before its weights are spoilt, and leaves the batch behind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from hybridvl.checkpoints.files import write_files
from hybridvl.layers.errors import RunError
from hybridvl.training.callbacks.checkpoints import LAST, checkpoint_folder
from hybridvl.training.callbacks.exact_resume import random_state
from hybridvl.training.optim import gradient_norm
from hybridvl.training.processes.sums import gathered, process_rank, summed
from hybridvl.training.trainer import is_dry_run, run_folder

FOLDER = "not_finite"
"""Where in a run folder the batches are kept."""


class FiniteLoss(Callback):
    """Ends a fit with a RunError at the first loss or gradient that is infinite or NaN.

    That is seen before the optimizer's step, of each batch where gradients are accumulated, and all processes end
    together: weights and checkpoints hold nothing of it. The batch is kept in RUN/not_finite/step_<n>_process_<rank>.pt
    by every process whose loss is not finite, or, where only gradients are not, by each of which that is true. Under
    `torch.load` such a file is {"batch", "step", "epoch", "batch_idx", "loss", "gradient_norm", "random"}, the last one
    for `hybridvl.training.callbacks.exact_resume.set_random_state`.

    With precision 16-mixed gradients may be infinite (the scaler leaves such steps out), so that only the loss counts.
    """

    def __init__(self) -> None:
        self._batch: dict[str, Any] = {}
        self._loss = torch.zeros(())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Hold the batch until its step is taken."""
        self._batch = {"batch": batch, "epoch": trainer.current_epoch, "batch_idx": batch_idx, "random": random_state()}

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Hold the loss."""
        self._loss = loss.detach()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop if something is not finite anywhere."""
        norm = torch.zeros((), device=self._loss.device)
        if trainer.precision != "16-mixed":
            norm = gradient_norm(pl_module.parameters())
        bad = torch.stack([~value.isfinite().to(self._loss.device) for value in (self._loss, norm)]).float()
        losses, gradients = summed(bad).tolist()
        if not (losses or gradients):
            return
        mine = bool(bad[0] if losses else bad[1])
        files = [file for file in gathered(self._save(trainer, float(norm)) if mine else None) if file is not None]
        raise RunError(_message(trainer, gathered((float(self._loss), float(norm))), files))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let go of the batch."""
        self._batch = {}

    def _save(self, trainer: Trainer, norm: float) -> str | None:
        if is_dry_run(trainer):
            return None
        step = trainer.global_step + 1
        facts = {"step": step, "loss": float(self._loss), "gradient_norm": norm}
        folder, name = run_folder(trainer) / FOLDER, f"step_{step}_process_{process_rank()}.pt"
        write_files(folder, {name: partial(torch.save, {**_on_cpu(self._batch), **facts})})
        return str(folder / name)


def _message(trainer: Trainer, values: list[tuple[float, float]], files: list[str]) -> str:
    losses = [loss for loss, _ in values if not math.isfinite(loss)]
    norms = [norm for _, norm in values if not math.isfinite(norm)]
    what = f"the loss is {losses[0]}" if losses else f"the loss is finite, but the norm of its gradient is {norms[0]}"
    last = checkpoint_folder(trainer) / LAST
    kept = [f"step {trainer.global_step + 1}: {what}; the step was not taken"]
    kept += [f"the batch is in {', '.join(files)}"] * bool(files)
    kept += [f"{last} is as it was"] * last.exists()
    helps = "a lower model.optimizer.lr, more warmup_steps or a trainer.gradient_clip_val"
    return f"{'; '.join(kept)}; where training has diverged, {helps} helps"


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return {key: _on_cpu(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(entry) for entry in value)
    return value
