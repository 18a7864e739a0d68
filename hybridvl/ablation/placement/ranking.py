"""Layers ranked by how much is lost where they give up attention, and searched for the set that loses least."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hybridvl.ablation.placement.hybrids import Placement
from hybridvl.ablation.placement.measures import Measures
from hybridvl.ablation.statistics import Interval, mean_interval

LINEAR: Placement = frozenset()


@dataclass(frozen=True)
class Ranking:
    """One way to say which layers are worth their attention.

    Attributes:
        name: "loss", "probe", "removal" or "beam".
        scores: of every layer, with an interval over samples; higher is more worth keeping. Empty where sets of layers
            are scored and not layers.
        chosen: the layers to keep, by their number.
    """

    name: str
    scores: Mapping[int, Interval]
    chosen: Callable[[int], Placement]

    @property
    def order(self) -> list[int]:
        """Layers by falling score, of equal ones the lower first."""
        return sorted(self.scores, key=lambda layer: (-self.scores[layer].mean, layer))


def by_scores(name: str, scores: Mapping[int, Sequence[float]]) -> Ranking:
    """The ranking of layers by the mean of their samples' scores."""
    found = {layer: mean_interval(values) for layer, values in scores.items()}
    ranking = Ranking(name, found, lambda count: frozenset(ranking.order[:count]))
    return ranking


def by_probe(measures: Measures) -> Ranking:
    """By how much the model of linear layers gains when one layer gets its attention back."""
    layers = measures.hybrids.layers
    probes = {layer: frozenset((layer,)) for layer in layers}
    found = measures.scores([LINEAR, *probes.values()])
    return by_scores("probe", {layer: _gains(measures, found[probe], found[LINEAR]) for layer, probe in probes.items()})


def by_removal(measures: Measures) -> Ranking:
    """By how much the model that keeps attention in every layer loses when one layer gives it up."""
    layers = measures.hybrids.layers
    everything = frozenset(layers)
    probes = {layer: everything - {layer} for layer in layers}
    found = measures.scores([everything, *probes.values()])
    scores = {layer: _gains(measures, found[everything], found[probe]) for layer, probe in probes.items()}
    return by_scores("removal", scores)


def by_beam(measures: Measures, width: int) -> Ranking:
    """By adding attention layer by layer to the model of linear layers, going on from the `width` best sets.

    The first step is that of `by_probe`; sets of several layers are measured as such, so that layers which do the same
    work are not all kept. At most width * count * layers sets are measured.
    """

    def chosen(count: int) -> Placement:
        beam = [LINEAR]
        for _ in range(count):
            wider = {placement | {layer} for placement in beam for layer in measures.hybrids.layers}
            wider -= set(beam)
            beam = best_first(measures, wider)[:width]
        return beam[0]

    return Ranking("beam", {}, chosen)


def best_first(measures: Measures, placements: set[Placement]) -> list[Placement]:
    """Placements by mean score, the best first; of equal ones the one with lower layers."""
    found = measures.scores(placements)
    means = {placement: measures.gain(float(np.mean(scores)), 0.0) for placement, scores in found.items()}
    return sorted(placements, key=lambda placement: (-means[placement], sorted(placement)))


def _gains(measures: Measures, scores: Sequence[float], over: Sequence[float]) -> list[float]:
    """Sample by sample, so that what makes a sample hard for both drops out."""
    return [measures.gain(*pair) for pair in zip(scores, over, strict=True)]
