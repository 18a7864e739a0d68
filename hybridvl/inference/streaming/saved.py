"""Streams on disk: a safetensors file with the state, and what the stream was and of which checkpoint beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hybridvl.checkpoints.files import usable_path, write_files
from hybridvl.checkpoints.fingerprint import fingerprint
from hybridvl.checkpoints.tensor_writing import in_file_order, make_header, tensors_writer
from hybridvl.inference.processor import Processor
from hybridvl.inference.streaming.steps import StepMaker
from hybridvl.inference.streaming.timeline import Timeline
from hybridvl.layers.errors import ConfigError
from hybridvl.models.decoder import ModelState
from hybridvl.models.vlm import VisionLanguageModel

FORMAT = "hybridvl-stream"
VERSION = 1

_FRAME = "waiting."  # names of the frames of a step that is not whole
_known: WeakKeyDictionary[VisionLanguageModel, tuple[list[tuple[int, int]], str]] = WeakKeyDictionary()


@dataclass(frozen=True)
class SavedStream:
    """All that a session has of its own.

    timeline: which tokens came when. steps: frames that wait. state: the model's.
    """

    timeline: Timeline
    steps: StepMaker
    state: ModelState


def write_stream(path: Path, model: VisionLanguageModel, stream: SavedStream) -> None:
    """Write a stream; the file gets its name when it is whole. ConfigError if it cannot be written."""
    frames, time = stream.steps.waiting()
    tensors = dict(stream.state.state_dict())
    tensors |= {f"{_FRAME}{number}": torch.from_numpy(frame.copy()) for number, frame in enumerate(frames)}
    record = {
        "timeline": stream.timeline.record(),
        "steps": {
            "limits": stream.steps.limits,
            "together": stream.steps.together,
            "time": time,
            "last": stream.steps.last,
        },
    }
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "checkpoint": _fingerprint(model),
        "stream": json.dumps(record, ensure_ascii=False),
    }
    ordered = in_file_order(tensors)
    header = make_header(ordered, metadata)
    writer = tensors_writer(header, ordered.values(), [tensor.dtype for tensor in ordered.values()])
    write_files(usable_path(path).parent, {path.name: writer})


def read_stream(path: Path, model: VisionLanguageModel, processor: Processor) -> SavedStream:
    """The stream in a file, for the model that it was written with.

    Raises:
        ConfigError: naming the file, and what is wrong with it.
    """
    if not usable_path(path).is_file():
        raise ConfigError(f"{path}: no such file; expected what hybridvl stream --save-state or session.save wrote")
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
    except OSError as error:
        raise ConfigError(f"{path}: it cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ConfigError(f"{path}: it is damaged: {error}") from error
    _check_origin(path, metadata, model)
    try:
        record = json.loads(metadata["stream"])
        steps = _steps(record["steps"], tensors, processor)
        timeline = Timeline.restored(processor.chat, record["timeline"], model.config.tokens_per_second)
        state = model.init_state(1)
        state.load_state_dict({name: tensor.to(model.lm_head_weight.device) for name, tensor in tensors.items()})
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise ConfigError(f"{path}: it is damaged: {error}") from error
    return SavedStream(timeline, steps, state)


def _steps(record: Mapping[str, Any], tensors: dict[str, Tensor], processor: Processor) -> StepMaker:
    """Takes the waiting frames out of `tensors`."""
    low, high = record["limits"]
    made = StepMaker(processor.images, (low, high), record["together"])
    names = sorted((name for name in tensors if name.startswith(_FRAME)), key=lambda name: int(name[len(_FRAME) :]))
    made.wait_again([tensors.pop(name).numpy() for name in names], record["time"], record["last"])
    return made


def _check_origin(path: Path, metadata: Mapping[str, str], model: VisionLanguageModel) -> None:
    if metadata.get("format") != FORMAT:
        raise ConfigError(f"{path}: format {metadata.get('format')!r}; expected a stream, {FORMAT!r}")
    if metadata.get("version") != str(VERSION):
        raise ConfigError(f"{path}: version {metadata.get('version')!r}; expected {VERSION}")
    own = _fingerprint(model)
    if metadata.get("checkpoint") != own:
        theirs = str(metadata.get("checkpoint"))
        raise ConfigError(
            f"{path}: written with the checkpoint {theirs[:12]}..., the model given is {own[:12]}...; "
            "expected the same weights, options and dtype"
        )


def _fingerprint(model: VisionLanguageModel) -> str:
    """Read once for each model, and again when a weight was written to (not through `.data`, which leaves no trace)."""
    if any(tensor.is_inference() for tensor in model.parameters()):
        return fingerprint(model)  # no versions are kept of these
    written = [(tensor.data_ptr(), tensor._version) for tensor in model.parameters()]
    if model not in _known or _known[model][0] != written:
        _known[model] = written, fingerprint(model)
    return _known[model][1]
