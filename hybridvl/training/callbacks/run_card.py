"""What a run is, on TensorBoard's Text, Images and Custom Scalars pages: settings, layers, and charts that belong
together."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from hybridvl.training.base import TrainingModule
from hybridvl.training.callbacks.hparams import settings_of

# Regular expressions of tags by chart and page; TensorBoard draws all runs into each chart.
LAYOUT = {
    "Quality": {
        "exact answers": ["Multiline", [r"val/exact$", r"test/exact$"]],
        "exact answers by kind": ["Multiline", [r"val/.+_exact$", r"test/.+_exact$"]],
        "loss": ["Multiline", [r"train/loss$", r"val/loss$", r"val/divergence$", r"train/layer_\d+$"]],
    },
    "Training": {
        "gradient norm": ["Multiline", [r"train/gradient_norm$"]],
        "learning rate": ["Multiline", [r"train/lr$"]],
    },
    "Cost": {
        "tokens per second": ["Multiline", [r"speed/tokens_per_s$"]],
        "memory (MiB)": ["Multiline", [r"memory/peak_rss_mib$", r"memory/cuda_peak_mib$"]],
        "norms of states": ["Multiline", [r"state_norm/layer_\d+$"]],
    },
}


class RunCard(Callback):
    """Writes, at the start of a fit, the text run/summary, the picture run/pattern and the layout of custom scalars.

    Args:
        seed: of the run.
        labels: what tells the run from others.
    """

    def __init__(self, seed: object = "", labels: Mapping[str, str] | None = None) -> None:
        self.seed = seed
        self.labels = dict(labels or {})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write them, on the first process; a run that goes on has them already."""
        if not trainer.is_global_zero or trainer.ckpt_path or not isinstance(pl_module, TrainingModule):
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("run/summary", self._summary(pl_module), 0)
                logger.experiment.add_image("run/pattern", _picture(pl_module), 0, dataformats="HWC")
                logger.experiment.add_custom_scalars(LAYOUT)

    def _summary(self, module: TrainingModule) -> str:
        """A table in Markdown."""
        trained = sum(p.numel() for p in module.net.parameters() if p.requires_grad)
        rows: dict[str, Any] = {**self.labels, **settings_of(module), "trained parameters": trained, "seed": self.seed}
        lines = (f"| {name} | {_shown(value)} |" for name, value in rows.items())
        return "\n".join(["| setting | value |", "|---|---|", *lines])


def _picture(module: TrainingModule) -> np.ndarray:
    """The layers, parameters by part and state over context, (H, W, 3) uint8."""
    import matplotlib.image

    from hybridvl.plan.costs import plan_model
    from hybridvl.plan.drawing import draw

    png = io.BytesIO()
    draw([plan_model(module.config)], png)
    png.seek(0)
    return np.asarray(np.rint(matplotlib.image.imread(png, format="png")[..., :3] * 255), dtype=np.uint8)


def _shown(value: object) -> str:
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return f"`{text}`" if isinstance(value, str) else text
