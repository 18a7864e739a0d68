"""How large the recurrent states grow: their norms, layer by layer, on a validation batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from hybridvl.models.vlm import VisionLanguageModel
from hybridvl.training.answers import model_inputs, sample_count


class StateNorms(Callback):
    """Logs state_norm/<layer> after each validation: the root mean square over the first batch's samples and heads of
    the Frobenius norm of the state matrix. Layers without a recurrent state (attention) are left out."""

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Mapping[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log for the first batch."""
        net = pl_module.net
        if (
            batch_idx
            or trainer.sanity_checking
            or not trainer.is_global_zero
            or not isinstance(net, VisionLanguageModel)
        ):
            return
        with trainer.precision_plugin.forward_context():  # as the model has just run
            norms = state_norms(net, batch)
        for logger in trainer.loggers:
            logger.log_metrics(norms, step=trainer.global_step)


@torch.no_grad()
def state_norms(net: VisionLanguageModel, batch: Mapping[str, Any]) -> dict[str, float]:
    """Metric name -> norm for every recurrent state after a batch."""
    state = net.init_state(sample_count(batch))
    net.hidden(**model_inputs(batch), state=state)
    width = len(str(len(state.layers) - 1))
    norms = {}
    for index, layer in enumerate(state.layers):
        for name, tensor in layer.tensors().items():
            owner, _, leaf = name.rpartition(".")
            if leaf == "recurrent":
                label = f"state_norm/layer_{index:0{width}d}" + (f".{owner}" if owner else "")
                norms[label] = _norm(tensor)
    return norms


def _norm(state: Tensor) -> float:
    """Root mean square over (B, H) of the Frobenius norms of state (B, H, K, V)."""
    return float(state.float().square().sum((-2, -1)).mean().sqrt())
