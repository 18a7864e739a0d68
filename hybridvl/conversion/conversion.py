"""The conversion itself: planned on shapes alone, then carried out tensor by tensor from the source's mapped files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridvl.checkpoints import Checkpoint, open_checkpoint
from hybridvl.checkpoints.checkpoint import EMBEDDING
from hybridvl.checkpoints.loading import (
    blank_model,
    cast_dtypes,
    check_dtype,
    check_finite,
    check_tensors,
    finite_tensor,
)
from hybridvl.conversion.account import account, mixer_prefix, source_name
from hybridvl.conversion.report import Report
from hybridvl.conversion.target import source_layers, target_config
from hybridvl.layers import ConfigError, MixerConfig
from hybridvl.layers.inherit import inherit_weights, inherited_pieces, mixer_tensors
from hybridvl.layers.pieces import Piece
from hybridvl.layers.short_conv import ShortConv
from hybridvl.models.config import ModelConfig
from hybridvl.models.vlm import VisionLanguageModel, init_weights

_MOST_ROWS = 2**18


@dataclass(frozen=True)
class Conversion:
    """A conversion that is planned and checked, before any weight is read.

    Attributes:
        checkpoint: the source.
        config: of the new model.
        follows: the source's layer that each new layer takes the place of.
        pieces: what each new layer's mixer takes over.
        report: what will become of every weight.
    """

    checkpoint: Checkpoint
    config: ModelConfig
    follows: tuple[int, ...]
    pieces: tuple[tuple[Piece, ...], ...]
    report: Report

    def model(self, seed: int = 0, dtype: torch.dtype | None = None, pass_convs: bool = False) -> VisionLanguageModel:
        """The new model, in eval mode, on the CPU.

        Copied tensors stay mapped from the source's files until they are written to or cast. What is new is drawn
        from the seed: the same for every inheritance, so that only what is inherited differs.

        Args:
            seed: of the new weights.
            dtype: of the parameters (what a mixer keeps in float32 stays so); None keeps the source's, which new
                weights get as well.
            pass_convs: see `convert`.
        """
        if not 0 <= seed < 2**63:
            raise ConfigError(f"seed: {seed}; expected a whole number from 0 to 2**63 - 1")
        check_dtype(dtype)
        model = blank_model(self.config, "the new model")
        tensors: dict[str, Tensor] = {}
        seen: set[str] = set()
        for name in model.state_dict():
            found = source_name(name, self.follows)
            if found is not None:
                tensors[name] = _unshared(self.checkpoint, found, seen)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for layer, mixer in enumerate(model.mixer_configs):
                own = self._mixer(layer, mixer, tensors[EMBEDDING].dtype, pass_convs, seen)
                tensors |= {mixer_prefix(layer) + name: tensor for name, tensor in own.items()}
        if dtype is not None:
            kept = {name: tensor.dtype for name, tensor in tensors.items()}
            for name, wanted in cast_dtypes(model, kept, dtype).items():
                check_finite(tensors[name], f"dtype: {name}", wanted)
                tensors[name] = tensors[name].to(wanted)
        model.load_state_dict(tensors, assign=True)
        return model.eval()

    def _mixer(
        self, layer: int, config: MixerConfig, dtype: torch.dtype, pass_convs: bool, seen: set[str]
    ) -> dict[str, Tensor]:
        pieces = self.pieces[layer]
        source = _MixerTensors(self.checkpoint, mixer_prefix(self.follows[layer]))
        shapes = {name: tuple(tensor.shape) for name, tensor in mixer_tensors(config, self.config.width).items()}
        whole = {piece.target: piece.source for piece in pieces if _whole(piece, shapes[piece.target])}
        if whole.keys() == shapes.keys():
            return {name: _unshared(self.checkpoint, source.prefix + whole[name], seen) for name in shapes}
        fresh = config.build(self.config.width)
        fresh.apply(partial(init_weights, std=self.config.init_std))
        for module in fresh.modules() if pass_convs else ():
            if isinstance(module, ShortConv):
                module.pass_through()
        fresh.to(dtype)
        inherit_weights(fresh, pieces, source)
        return {name: tensor.detach() for name, tensor in fresh.state_dict().items()}


def convert(
    source: str | Path,
    pattern: str,
    inherit: str = "qkvo",
    mixers: Mapping[str, Any] | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    pass_convs: bool = False,
) -> tuple[VisionLanguageModel, Report]:
    """A model of another layer pattern with a checkpoint's weights wherever they have a place.

    Vision tower, embeddings, MLPs, norms and head are the source's, and so is every mixer that is the same or only
    gains or loses a window. The other mixers are freshly initialised, or inherit what `hybridvl.layers.inherit` says.

    Args:
        source: folder or hub id of any checkpoint that `hybridvl.load` takes.
        pattern: layer pattern of the new model.
        inherit: "none" or "qkvo".
        mixers: named mixers and overrides; what they leave open is sized like the source's attention.
        layers: for every layer of the pattern, the number of the source's layer whose place it takes; None: the same
            number, which needs as many layers as the source has.
        seed: of new weights.
        dtype: of the parameters; None keeps the source's.
        pass_convs: new short convolutions hand on the current token instead of being random, so that what is inherited
            is not scrambled by them.

    Returns:
        the model, in eval mode, and the report.

    Raises:
        ConfigError: a mistake in the arguments, a damaged source, numbers of heads that do not divide.
    """
    conversion = prepare(open_checkpoint(source), pattern, inherit, mixers, layers)
    return conversion.model(seed, dtype, pass_convs), conversion.report


def prepare(
    checkpoint: Checkpoint,
    pattern: str,
    inherit: str = "qkvo",
    mixers: Mapping[str, Any] | None = None,
    layers: Sequence[int] | None = None,
    place: str = "mixers",
) -> Conversion:
    """The plan of a conversion, made from names and shapes alone; arguments and errors as in `convert`.

    place: where mixers stand, for messages.
    """
    config = target_config(checkpoint.config, pattern, mixers, place)
    old, new = blank_model(checkpoint.config, str(checkpoint.folder)), blank_model(config, "the new model")
    _check_sizes(new)
    check_tensors(checkpoint, old)
    shapes = {name: checkpoint.shape(name) for name in checkpoint.names}
    follows = source_layers(layers, len(new.mixer_configs), len(old.mixer_configs), new.pattern)
    pieces = _pieces(old, new, follows, inherit)
    report = account(shapes, old, new, follows, pieces, str(checkpoint.folder), inherit)
    return Conversion(checkpoint, config, tuple(follows), pieces, report)


def _check_sizes(model: VisionLanguageModel) -> None:
    """Raise ConfigError for mixers whose rows are too many to be accounted for one by one."""
    for name, tensor in model.state_dict().items():
        if ".mixer." in name and max((*tensor.shape, 1)) > _MOST_ROWS:
            raise ConfigError(
                f"{name} would have the shape {tuple(tensor.shape)}; expected at most {_MOST_ROWS} rows and columns: "
                "fewer or smaller heads"
            )


def _pieces(
    old: VisionLanguageModel, new: VisionLanguageModel, follows: Sequence[int], inherit: str
) -> tuple[tuple[Piece, ...], ...]:
    found = []
    for layer, origin in enumerate(follows):
        pair = new.mixer_configs[layer], old.mixer_configs[origin]
        try:
            found.append(tuple(inherited_pieces(*pair, new.config.width, inherit)))
        except ConfigError as error:
            raise ConfigError(f"layer {layer}: {error}") from error
    return tuple(found)


@dataclass(frozen=True)
class _MixerTensors(Mapping[str, Tensor]):
    """The tensors of one of the source's mixers, read when they are asked for."""

    checkpoint: Checkpoint
    prefix: str

    def __getitem__(self, name: str) -> Tensor:
        return finite_tensor(self.checkpoint, self.prefix + name)

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self.prefix) for name in self.checkpoint.names if name.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _unshared(checkpoint: Checkpoint, name: str, seen: set[str]) -> Tensor:
    """A tensor of the source; a copy from the second time on, so that no two layers are trained as one."""
    tensor = finite_tensor(checkpoint, name)
    if name in seen:
        return tensor.clone()
    seen.add(name)
    return tensor


def _whole(piece: Piece, shape: tuple[int, ...]) -> bool:
    """Whether a piece is a whole tensor as it is."""
    rows = range((*shape, 1)[0])
    return piece.axis == 0 and piece.scale == 1 and piece.into == rows and piece.taken == rows
