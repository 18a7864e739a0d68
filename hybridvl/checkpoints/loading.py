"""Models loaded from checkpoints: every tensor accounted for, mapped from the files, never in memory twice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from hybridvl.checkpoints.checkpoint import EMBEDDING, Checkpoint, open_checkpoint
from hybridvl.checkpoints.comparison import check_same_model
from hybridvl.checkpoints.origin import remember_origin
from hybridvl.layers.errors import ConfigError, within
from hybridvl.models.config import ModelConfig
from hybridvl.models.vlm import VisionLanguageModel
from hybridvl.pattern import parse_pattern

_LISTED = 8  # tensors that an error message names for each kind of mistake
_PIECE = 1 << 22  # numbers looked at together when a tensor is checked
_MOST = 10**12  # parameters of a layer's mixer
_RELEASED = 1 << 28  # bytes that are copied out of mapped files before these are unmapped
_WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def load(path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> VisionLanguageModel:
    """The model in a folder, or of a Hugging Face hub id ("org/name"), in eval mode.

    Folders: our own (`save`), Qwen2.5-VL, InfiniteVL, Mamba2, and decoders of Qwen3-Next and OLMo-Hybrid that are
    Gated DeltaNet alone; safetensors, sharded or not. dtype: of the parameters, None keeps the saved one (what a mixer
    keeps in float32 stays so). On the CPU in the saved dtype the parameters are mapped from the files.

    Raises ConfigError for a missing or damaged checkpoint, for pickles, for NaN or infinite weights, for a dtype that
    cannot hold one of the numbers, and unless every tensor of the model is in the folder with its shape and none is
    left over.
    """
    check_dtype(dtype)
    checkpoint = open_checkpoint(path)
    model = blank_model(checkpoint.config, str(checkpoint.folder))
    check_tensors(checkpoint, model)
    target = torch.device(device)
    dtypes = cast_dtypes(model, {name: checkpoint.dtype(name) for name in checkpoint.names}, dtype)
    mapped = target.type == "cpu" and all(checkpoint.dtype(name) == dtype for name, dtype in dtypes.items())
    tensors: dict[str, Tensor] = {}
    copied = 0
    for name, wanted in dtypes.items():
        tensor = finite_tensor(checkpoint, name, wanted)
        tensors[name] = tensor if mapped else tensor.to(device=target, dtype=wanted, copy=True)
        copied += 0 if mapped else tensor.nbytes
        if copied > _RELEASED:
            del tensor
            checkpoint.release()
            copied = 0
    model.load_state_dict(tensors, assign=True)
    remember_origin(model, checkpoint)
    checkpoint.release()
    return model.eval()


def load_weights(model: VisionLanguageModel, path: str | Path) -> None:
    """Copy a folder's weights into a model of the same configuration; ConfigError says which layers differ.

    The model is as it was after any error.
    """
    checkpoint = open_checkpoint(path)
    check_same_model(checkpoint.config, model.config, str(checkpoint.folder))
    check_tensors(checkpoint, model)
    own = model.state_dict()
    model.load_state_dict({name: finite_tensor(checkpoint, name, own[name].dtype) for name in checkpoint.names})


def blank_model(config: ModelConfig, place: str) -> VisionLanguageModel:
    """The model of a configuration on the meta device: names and shapes without memory.

    Raises ConfigError, naming the place, for mistakes in the configuration, and for layers beyond what can be built.
    """
    with within(place):
        for layer, mixer in enumerate(parse_pattern(config.pattern, config.mixers).configs(config.mixers)):
            if mixer.num_params(config.width) > _MOST:
                name = type(mixer).__name__.removesuffix("Config")
                raise ConfigError(f"layer {layer}: {name} of more than {_MOST:.0e} parameters; expected fewer")
        with torch.device("meta"):
            return VisionLanguageModel(config)


def check_tensors(checkpoint: Checkpoint, model: VisionLanguageModel) -> None:
    """Raise ConfigError unless every tensor of the model is there with its shape, in floating point, and no other."""
    own, found = model.state_dict(), checkpoint.names
    shapes = [
        f"{checkpoint.spelled(name)} has shape {checkpoint.shape(name)}, expected {tuple(own[name].shape)}"
        for name in found
        if name in own and checkpoint.shape(name) != tuple(own[name].shape)
    ]
    dtypes = [
        f"{checkpoint.spelled(name)} has dtype {checkpoint.dtype(name)}, expected a floating-point one"
        for name in found
        if name in own and checkpoint.dtype(name) not in _WEIGHT_DTYPES
    ]
    missing = _listed("missing", (checkpoint.spelled(name) for name in own.keys() - set(found)))
    left = _listed("left over", (checkpoint.spelled(name) for name in found if name not in own))
    problems = [*missing, *left, *_cut(shapes), *_cut(dtypes)]
    if problems:
        raise ConfigError(
            f"{checkpoint.folder}: weights do not fit the configuration beside them: {'; '.join(problems)}"
        )
    if checkpoint.tied_head is not None:
        head, embedding = checkpoint.files.tensor(checkpoint.tied_head), checkpoint.tensor(EMBEDDING)
        if not torch.equal(head, embedding):
            raise ConfigError(
                f"{checkpoint.folder}: {checkpoint.tied_head} differs from the embedding, though config.json ties "
                "them; expected equal tensors, or tie_word_embeddings false"
            )


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise ConfigError unless parameters can be cast to a dtype; None leaves them as they are."""
    if dtype is not None and dtype not in _WEIGHT_DTYPES:
        raise ConfigError(f"dtype: {dtype!r}; expected one of {', '.join(map(str, _WEIGHT_DTYPES))}")


def cast_dtypes(
    model: VisionLanguageModel, stored: Mapping[str, torch.dtype], dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """Every parameter's dtype once a model with parameters of the dtypes `stored` is cast to `dtype`.

    model: on the meta device; its modules decide what to keep in float32, and it is left with parameters so cast.
    """
    blank = {
        name: torch.empty(tensor.shape, dtype=stored[name], device="meta")
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(blank, assign=True)
    model.to(dtype=dtype)
    return {name: tensor.dtype for name, tensor in model.state_dict().items()}


def finite_tensor(checkpoint: Checkpoint, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor by our name, looked through piece by piece, which copies nothing; errors as of `check_finite`."""
    tensor = checkpoint.tensor(name)
    check_finite(tensor, f"{checkpoint.folder}: {checkpoint.spelled(name)}", dtype)
    return tensor


def check_finite(tensor: Tensor, place: str, dtype: torch.dtype | None = None) -> None:
    """Raise ConfigError, naming the place, unless all numbers are finite, and stay so in the dtype they are meant for.

    The tensor is looked through piece by piece, which copies nothing.
    """
    for piece in tensor.flatten().split(_PIECE):
        bounds = torch.stack(torch.aminmax(piece)) if len(piece) else piece
        if not bounds.isfinite().all():
            raise ConfigError(f"{place} holds NaN or infinite numbers; expected finite weights")
        if dtype is not None and not bounds.to(dtype).isfinite().all():
            kind, most = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
            largest = max(bounds.tolist(), key=abs)
            raise ConfigError(f"{place} holds {largest:.6g}, too large for {kind}; expected at most {most:.6g}")


def _listed(what: str, names: Iterable[str]) -> list[str]:
    ordered = sorted(names)
    if not ordered:
        return []
    more = f" and {len(ordered) - _LISTED} more" if len(ordered) > _LISTED else ""
    return [f"{what}: {', '.join(ordered[:_LISTED])}{more}"]


def _cut(problems: list[str]) -> list[str]:
    more = len(problems) - _LISTED
    return [*problems[:_LISTED], *([f"and {more} more"] if more > 0 else [])]
