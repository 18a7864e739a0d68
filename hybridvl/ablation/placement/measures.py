"""What is measured of hybrids, sample by sample: layers' distances from the teacher's, and what the models predict."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hybridvl.ablation.placement.hybrids import Hybrids, Placement
from hybridvl.layers.errors import ConfigError
from hybridvl.training.answers import answers_right
from hybridvl.training.base import Batch, real_positions
from hybridvl.training.layer_distillation import token_distances
from hybridvl.training.losses.cross_entropy import label_positions, linear_cross_entropy
from hybridvl.training.losses.divergences import linear_divergence

METRICS = {"divergence": False, "cross_entropy": False, "exact": True}
"""What can be measured of a model's answers, and whether more of it is better."""


@dataclass
class Measures:
    """Scores of hybrids on some batches; what has been measured once is remembered.

    A sample's score is the mean over the positions that predict its answers; samples without answers have none. With
    "divergence" it is KL(teacher || hybrid) in nats, with "cross_entropy" that of the answers' tokens in nats, with
    "exact" the share of its answers all of whose tokens are the most likely ones.

    Attributes:
        hybrids: the models.
        batches: on any device.
        metric: one of `METRICS`.
        prepare: puts a batch where the models are.
    """

    hybrids: Hybrids
    batches: Sequence[Batch]
    metric: str = "divergence"
    prepare: Callable[[Batch], Batch] = lambda batch: batch
    _known: dict[Placement, list[float]] = field(default_factory=dict)

    def scores(self, placements: Collection[Placement]) -> dict[Placement, list[float]]:
        """The score of every sample for every placement.

        Raises:
            ConfigError: no sample has an answer, or only one has.
        """
        new = set(placements) - self._known.keys()
        if new:
            found: dict[Placement, list[float]] = {placement: [] for placement in new}
            with torch.no_grad():
                for batch in map(self.prepare, self.batches):
                    shared = self.hybrids.embedded(batch)
                    for placement, hidden in self.hybrids.hidden(shared, new):
                        found[placement] += self._samples(batch, hidden, shared.taught)
            samples = len(next(iter(found.values())))
            if samples < 2:
                raise ConfigError(f"data: {samples} validation samples with answers; expected at least 2")
            self._known |= found
        return {placement: self._known[placement] for placement in placements}

    def gain(self, score: float, over: float) -> float:
        """How much better one score is than another."""
        return score - over if METRICS[self.metric] else over - score

    def _samples(self, batch: Batch, hidden: Tensor, taught: Tensor) -> Iterator[float]:
        labels, predicts = batch["labels"], label_positions(batch["labels"])
        weight = self.hybrids.teacher.lm_head_weight
        for row in range(len(labels)):
            where = predicts[row]
            if not where.any():
                continue
            own = hidden[row][where]
            if self.metric == "divergence":
                yield float(linear_divergence(own, weight, taught[row][where], weight))
                continue
            loss, hits = linear_cross_entropy(own, weight, labels[row, 1:][where[:-1]])
            yield float(answers_right(labels[row : row + 1], hits).double().mean() if self.metric == "exact" else loss)


def layer_losses(
    hybrids: Hybrids,
    batches: Sequence[Batch],
    kind: str = "mse",
    match: str = "layer",
    prepare: Callable[[Batch], Batch] = lambda batch: batch,
) -> dict[int, list[float]]:
    """For every layer of the student, how far it is from the teacher's, both fed the teacher's input; by sample.

    A sample's loss is the mean over its real tokens; `kind` and `match` are those of `LayerDistillation`.
    """
    found: dict[int, list[float]] = {layer: [] for layer in hybrids.layers}
    with torch.no_grad():
        for batch in map(prepare, batches):
            shared, real = hybrids.embedded(batch), real_positions(batch)
            for layer in hybrids.layers:
                own, theirs = hybrids.own(layer)
                both: Any = ((own, shared.own_sequence), (theirs, shared.sequence))
                x = shared.inputs[layer]
                output, target = (b(x, s) if match == "layer" else b.mix_alone(x, s) for b, s in both)
                distances = torch.where(real, token_distances(output, target, kind), 0)
                found[layer] += (distances.sum(1) / real.sum(1)).tolist()
    return found
