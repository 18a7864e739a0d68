"""Models in folders: our own checkpoints saved and loaded, Qwen2.5-VL, InfiniteVL and Mamba2 checkpoints loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridvl.checkpoints.checkpoint import FORMAT_VERSION, Checkpoint, checkpoint_folder, open_checkpoint
from hybridvl.checkpoints.files import write_json
from hybridvl.checkpoints.weights import write_weights
from hybridvl.layers import ConfigError
from hybridvl.models.config import ModelConfig
from hybridvl.models.vlm import VisionLanguageModel
from hybridvl.pattern import parse_pattern

FORMATS = ("hybridvl",)
_LISTED = 8  # differences that an error message spells out
# What a model may change without its weights becoming another model's.
_FREE_FIELDS = {"pattern", "mixers", "init_std", "activation_checkpointing"}
_FREE_OPTIONS = {"backend"}


def load(path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> VisionLanguageModel:
    """The model in a folder, or of a Hugging Face hub id ("org/name"), in eval mode.

    Folders: our own (`save`), Qwen2.5-VL, InfiniteVL and Mamba2, with safetensors, sharded or not. dtype: of the
    parameters, None keeps the saved one (what a mixer keeps in float32 stays so). Raises ConfigError for a missing or
    damaged checkpoint, for pickles, and unless every tensor of the model is in the folder and none is left over.
    """
    folder = checkpoint_folder(path)
    config, tensors = _read(folder)
    with torch.device("meta"):
        model = VisionLanguageModel(config)
    _check_tensors(model, tensors, folder)
    model.load_state_dict(tensors, assign=True)
    return model.to(device=device, dtype=dtype).eval()


def load_weights(model: VisionLanguageModel, path: str | Path) -> None:
    """Copy a folder's weights into a model of the same configuration; ConfigError says which layers differ."""
    folder = checkpoint_folder(path)
    config, tensors = _read(folder)
    check_same_model(config, model.config, str(folder))
    _check_tensors(model, tensors, folder)
    model.load_state_dict(tensors)


def save(model: VisionLanguageModel, path: str | Path, format: str = "hybridvl") -> None:
    """Write config.json and model.safetensors into a folder, each atomically.

    Raises ConfigError when the folder cannot be written (permissions, full disk); older files then are intact.
    """
    if format not in FORMATS:
        raise ConfigError(f"format: {format!r}; expected one of {', '.join(FORMATS)}")
    folder = Path(path)
    write_weights(model.state_dict(), folder)
    values = {"format_version": FORMAT_VERSION, **model.config.to_dict(), "pattern": model.pattern}
    write_json(values, folder / "config.json")


def read_config(path: str | Path) -> ModelConfig:
    """The configuration of the model in a folder, from config.json and, for foreign folders, the tensors' names."""
    return open_checkpoint(path).config


def check_same_model(saved: ModelConfig, own: ModelConfig, place: str) -> None:
    """Raise ConfigError that says which layers and sizes differ, if weights of `saved` do not fit `own`."""
    differences = [*_layer_differences(saved, own), *_size_differences(saved, own)]
    if differences:
        more = len(differences) - _LISTED
        listed = "; ".join(differences[:_LISTED]) + (f"; and {more} more" if more > 0 else "")
        raise ConfigError(
            f"{place}: a checkpoint of pattern {_canonical(saved)!r} does not fit a model of pattern "
            f"{_canonical(own)!r}: {listed}"
        )


def _read(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The configuration, and all tensors under our names."""
    checkpoint = Checkpoint(folder)
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names}
    if checkpoint.config.tie_embeddings:
        _drop_tied_head(tensors, folder)
    return checkpoint.config, tensors


def _drop_tied_head(tensors: dict[str, Tensor], folder: Path) -> None:
    """Some checkpoints with a tied head hold it all the same; it must be the embedding then."""
    head, embedding = tensors.pop("lm_head.weight", None), tensors.get("decoder.embed_tokens.weight")
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise ConfigError(
            f"{folder}: lm_head.weight differs from the embedding, though config.json ties them; expected equal "
            "tensors, or tie_word_embeddings false"
        )


def _check_tensors(model: VisionLanguageModel, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Every tensor of the model must be there with its shape, and no other."""
    own = model.state_dict()
    shapes = [
        f"{name} has shape {tuple(tensors[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    missing, left = own.keys() - tensors.keys(), tensors.keys() - own.keys()
    problems = [*_listed("missing", missing), *_listed("left over", left), *shapes[:_LISTED]]
    if problems:
        raise ConfigError(f"{folder}: weights do not fit the configuration beside them: {'; '.join(problems)}")


def _listed(what: str, names: Iterable[str]) -> list[str]:
    ordered = sorted(names)
    if not ordered:
        return []
    more = f" and {len(ordered) - _LISTED} more" if len(ordered) > _LISTED else ""
    return [f"{what}: {', '.join(ordered[:_LISTED])}{more}"]


def _layer_differences(saved: ModelConfig, own: ModelConfig) -> list[str]:
    found: list[str] = []
    pairs = zip_longest(_layers(saved), _layers(own))
    for number, (there, here) in enumerate(pairs):
        if there is None or here is None:
            found.append(f"{len(_layers(saved))} layers there, {len(_layers(own))} here")
            break
        if there[1] != here[1]:
            same_text = there[0] == here[0]
            texts = [_options(side[1], there[1], here[1]) if same_text else side[0] for side in (there, here)]
            found.append(f"layer {number} is {texts[0]} there, {texts[1]} here")
    return found


def _layers(config: ModelConfig) -> list[tuple[str, dict[str, Any]]]:
    """Every layer's text in the pattern and the options that it resolves to."""
    pattern = parse_pattern(config.pattern, config.mixers)
    resolved = pattern.configs(config.mixers, path="mixers")
    described = ({"type": type(layer).__name__, **_plain(dataclasses.asdict(layer))} for layer in resolved)
    return list(zip(pattern.layers, described, strict=True))


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in _FREE_OPTIONS}


def _options(side: Mapping[str, Any], there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in side.items() if there.get(key) != here.get(key))


def _size_differences(saved: ModelConfig, own: ModelConfig) -> list[str]:
    names = [f.name for f in dataclasses.fields(ModelConfig) if f.name not in _FREE_FIELDS]
    pairs = ((name, getattr(saved, name), getattr(own, name)) for name in names)
    return [f"{name} is {there} there, {here} here" for name, there, here in pairs if there != here]


def _canonical(config: ModelConfig) -> str:
    return str(parse_pattern(config.pattern, config.mixers))
