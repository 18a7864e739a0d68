"""The model of a training checkpoint, without the fit that wrote it: one file, or a folder of shards put together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hybridvl.checkpoints import load_weights
from hybridvl.layers.errors import ConfigError, within
from hybridvl.models.config import ModelConfig
from hybridvl.models.vlm import VisionLanguageModel
from hybridvl.training.base import MODEL_KEY
from hybridvl.training.checkpoints.files import read_checkpoint
from hybridvl.training.lora import Adapters, adapter_settings

_NET = "net."  # where a training module has its model


def checkpoint_model(path: str | Path, source: str | None = None) -> VisionLanguageModel:
    """The model whose weights a checkpoint holds, on the CPU, in eval mode; adapters are merged into it.

    Args:
        path: a file, or a folder of shards.
        source: folder of the model that a checkpoint's adapters are for; others need none.

    Raises:
        ConfigError: a missing or damaged checkpoint, one of something else, or adapters without their model.
    """
    checkpoint = read_checkpoint(path, optimizers=False)
    if MODEL_KEY not in checkpoint:
        raise ConfigError(f"checkpoint {path}: does not say which model it is of (no {MODEL_KEY!r} in it)")
    config = ModelConfig.from_dict(checkpoint[MODEL_KEY])
    weights = {name.removeprefix(_NET): tensor for name, tensor in checkpoint["state_dict"].items()}
    settings = adapter_settings(checkpoint)
    if settings is None:
        with torch.device("meta"):
            model = VisionLanguageModel(config)
        return _filled(model, weights, path, strict=True)
    if source is None:
        raise ConfigError(f"checkpoint {path}: holds adapters alone; expected the folder of the model they are for")
    model = VisionLanguageModel(config)
    with within("source"):
        load_weights(model, source)
    model.to(next(iter(weights.values())).dtype)  # what the fit has computed in
    trained = {name.replace(".base_layer.", ".") for name in weights}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    adapters = Adapters(model, settings, source)
    adapters.check(checkpoint)
    _filled(model, weights, path, strict=False)
    return adapters.merged().eval()


def _filled(model: VisionLanguageModel, weights: dict[str, Any], path: str | Path, strict: bool) -> VisionLanguageModel:
    try:
        found = model.load_state_dict(weights, strict=strict, assign=True)
    except RuntimeError as error:
        raise ConfigError(f"checkpoint {path}: {str(error).splitlines()[-1].strip()}") from error
    if found.unexpected_keys:
        raise ConfigError(f"checkpoint {path}: {found.unexpected_keys[0]} is no weight of its model")
    return model.eval()
