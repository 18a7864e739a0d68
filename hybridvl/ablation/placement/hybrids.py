"""Hybrids of a teacher and its student of linear layers: assembled from the weights of both, run together."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hybridvl.checkpoints import open_checkpoint
from hybridvl.checkpoints.loading import blank_model
from hybridvl.conversion import prepare
from hybridvl.conversion.account import mixer_prefix
from hybridvl.layers import MixerConfig, Sequence
from hybridvl.layers.errors import ConfigError
from hybridvl.layers.ops.one_row import one_row_products
from hybridvl.models.block import Block
from hybridvl.models.config import ModelConfig
from hybridvl.models.vlm import VisionLanguageModel
from hybridvl.pattern import parse_pattern
from hybridvl.training.base import Batch, causal_inputs, embedded
from hybridvl.training.layer_distillation import LayerDistillation
from hybridvl.training.student import replaced_layers

Placement = frozenset[int]
"""Numbers of the layers that keep attention."""

KEEPS = ("copied", "window")  # what a conversion may say of a layer that keeps its attention


@dataclass(frozen=True)
class Hybrids:
    """All models that have in each of `layers` either the teacher's attention or the student's mixer.

    Attributes:
        teacher, student: of a stage I a; everything but the mixers is the same in both.
        layers: where they differ.
        attention: the mixers of these layers where attention is kept: the teacher's own, or new ones of its weights
            with another window.
    """

    teacher: VisionLanguageModel
    student: VisionLanguageModel
    layers: tuple[int, ...]
    attention: Mapping[int, nn.Module]

    def embedded(self, batch: Batch) -> Embedded:
        """What all of them share about a batch."""
        inputs = causal_inputs(batch)
        x, positions = embedded(self.teacher, inputs)
        packed = inputs.get("cu_seqlens")
        sequences = [net.layer_sequence(x, positions, cu_seqlens=packed) for net in (self.teacher, self.student)]
        collected: list[Tensor] = []
        taught = self.teacher.run_decoder(x, positions, cu_seqlens=packed, collected=collected)
        return Embedded(x, sequences[0], sequences[1], tuple(collected[:-1]), taught)

    def hidden(self, shared: Embedded, placements: Collection[Placement]) -> Iterator[tuple[Placement, Tensor]]:
        """Every placement with its hidden states (B, T, D) after the final norm, in no certain order.

        Layers below the first one in which placements differ run once for all of them.
        """
        with one_row_products(shared.x):
            yield from self._walk(shared, shared.x, 0, set(placements))

    def model(self, placement: Placement, config: ModelConfig) -> VisionLanguageModel:
        """One of them as a model of its own, in eval mode; its weights are those of the teacher and the student.

        config: of a model with the placement's pattern.
        """
        found = blank_model(config, "the hybrid")
        weights = self.student.state_dict()
        for layer in placement:
            prefix = mixer_prefix(layer)
            weights = {name: tensor for name, tensor in weights.items() if not name.startswith(prefix)}
            weights |= {prefix + name: tensor for name, tensor in self.attention[layer].state_dict().items()}
        found.load_state_dict(weights, assign=True)
        return found.eval()

    def own(self, layer: int) -> tuple[Block, Block]:
        """The student's layer and the teacher's."""
        own, theirs = (net.decoder.layers[layer] for net in (self.student, self.teacher))
        assert isinstance(own, Block)
        assert isinstance(theirs, Block)
        return own, theirs

    def _walk(
        self, shared: Embedded, x: Tensor, layer: int, placements: set[Placement]
    ) -> Iterator[tuple[Placement, Tensor]]:
        if layer == len(self.teacher.decoder.layers):
            (placement,) = placements
            yield placement, self.teacher.decoder.norm(x)
            return
        own, theirs = self.own(layer)
        keeping = {placement for placement in placements if layer in placement or layer not in self.layers}
        if keeping:
            mixer = self.attention.get(layer, theirs.mixer)
            following = theirs.finish(x, mixer(theirs.mixer_norm(x), shared.sequence))
            yield from self._walk(shared, following, layer + 1, keeping)
        if placements - keeping:
            yield from self._walk(shared, own(x, shared.own_sequence), layer + 1, placements - keeping)


@dataclass(frozen=True)
class Embedded:
    """What the hybrids of a teacher share about a batch.

    Attributes:
        x: (B, T, D) embeddings.
        sequence, own_sequence: what the layers of the teacher, and those of the student, share about them.
        inputs: (B, T, D) each: what the teacher's layers are fed.
        taught: (B, T, D), the teacher's hidden states after the final norm.
    """

    x: Tensor
    sequence: Sequence
    own_sequence: Sequence
    inputs: tuple[Tensor, ...]
    taught: Tensor


def assemble(
    stage: LayerDistillation, teacher: str, attention: str, mixers: Mapping[str, Any] | None = None
) -> Hybrids:
    """The hybrids of a stage I a, whose student is made of linear layers.

    Args:
        stage: teacher and student, on the device and in the dtype in which they are to run.
        teacher: the teacher's folder.
        attention: the layer that is kept, see `kept_attention`.
        mixers: named mixers and overrides, those of the student.

    Raises:
        ConfigError: attention that is not the teacher's; a student in which more than mixers differs.
    """
    layers = replaced_layers(stage.net.config, stage.teacher.config)
    _check_shared(stage.net, stage.teacher, layers)
    kept: dict[int, nn.Module] = {}
    for layer, config in kept_attention(teacher, attention, layers, mixers).items():
        theirs = stage.teacher.decoder.layers[layer]
        assert isinstance(theirs, Block)
        kept[layer] = theirs.mixer
        if config is not None:
            kept[layer] = config.build(stage.teacher.config.width)
            kept[layer].load_state_dict(theirs.mixer.state_dict(), assign=True)
    return Hybrids(stage.teacher, stage.net, layers, kept)


def kept_attention(
    teacher: str, attention: str, layers: Iterable[int], mixers: Mapping[str, Any] | None = None
) -> dict[int, MixerConfig | None]:
    """What keeps the teacher's weights in each layer where attention is kept; None: the teacher's own mixer.

    Args:
        teacher: its folder.
        attention: one layer as patterns write it, such as "full" or "swa(window=64)".
        layers: where it may be kept.
        mixers: named mixers and overrides.

    Raises:
        ConfigError: attention that is not the teacher's, windows aside.
    """
    checkpoint = open_checkpoint(teacher)
    depth = len(parse_pattern(checkpoint.config.pattern, checkpoint.config.mixers))
    plan = prepare(checkpoint, f"({attention})*{depth}", "none", mixers)
    configs = parse_pattern(plan.config.pattern, plan.config.mixers).configs(plan.config.mixers)
    found: dict[int, MixerConfig | None] = {}
    for layer in layers:
        report = plan.report.layers[layer]
        if report.how not in KEEPS:
            raise ConfigError(
                f"{attention!r} cannot go on with the weights of the teacher's layer {layer} ({report.before}); "
                "expected that layer, or the same with another window, such as swa(window=64)"
            )
        found[layer] = configs[layer] if report.how == "window" else None
    return found


def _check_shared(student: VisionLanguageModel, teacher: VisionLanguageModel, layers: Collection[int]) -> None:
    """Raise ConfigError unless both have the same numbers in everything but the mixers of these layers."""
    mixers = tuple(map(mixer_prefix, layers))
    theirs = dict(teacher.named_parameters())
    for name, own in student.named_parameters():
        if not name.startswith(mixers) and own is not theirs[name] and not torch.equal(own, theirs[name]):
            raise ConfigError(
                f"{name} is not the teacher's; expected a student of stage I a, which differs from its teacher in "
                "mixers alone"
            )
