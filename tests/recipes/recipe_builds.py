"""Recipes built on the meta device."""

from __future__ import annotations

from typing import Any

import torch

from hybridvl.checkpoints import read_config
from hybridvl.cli.training import TrainingCLI
from hybridvl.models.vlm import VisionLanguageModel
from hybridvl.training.freezing import choose_trained
from hybridvl.training.student import Pair, StudentConfig, replaced_layers, student_net


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


def pair_of_configurations(
    config: StudentConfig, seed: int, train_only: Any = ("mixers:new",), freeze: Any = ()
) -> Pair:
    """What `build_pair` makes of configurations alone."""
    net = read_config(config.teacher)
    assert config.source is None or read_config(config.source).pattern == student_net(config, net).pattern
    teacher, student = VisionLanguageModel(net), VisionLanguageModel(student_net(config, net))
    replaced = replaced_layers(student.config, net)
    choose_trained(student, train_only, freeze, replaced)
    return Pair(teacher, student, replaced)
