"""Recipes built on the meta device."""

from __future__ import annotations

from typing import Any

import torch

from hybridvl.cli.training import TrainingCLI


class _Built(TrainingCLI):
    """Stops where the trainer would begin."""

    def before_fit(self) -> None:
        return

    def fit(self, model: Any, datamodule: Any, ckpt_path: str | None = None) -> None:
        return

    def after_fit(self) -> None:
        return


def build(*arguments: str) -> TrainingCLI:
    """What `hybridvl fit` makes of arguments, without memory for weights and without training."""
    with torch.device("meta"):
        return _Built("fit", arguments)
