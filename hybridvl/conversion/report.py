"""What became of every weight in a conversion: by tensor, by layer, by part of the model, and in all."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Counts:
    """Numbers of weights; copied + repeated + new are the new model's, copied + left the source's.

    Attributes:
        copied: of the new model, taken from the source, each of the source's once.
        repeated: of the new model, taken from weights of the source that have been copied already.
        new: of the new model, freshly initialised.
        left: of the source, without a place in the new model.
    """

    copied: int = 0
    repeated: int = 0
    new: int = 0
    left: int = 0

    def __add__(self, other: Counts) -> Counts:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Counts(*(one + another for one, another in pairs))

    @property
    def params(self) -> int:
        """Weights of the new model."""
        return self.copied + self.repeated + self.new

    def to_dict(self) -> dict[str, int]:
        """Plain values, the new model's total included."""
        return {**dataclasses.asdict(self), "params": self.params}


@dataclass(frozen=True)
class Inherited:
    """A part of a tensor that comes from the source.

    Attributes:
        source: name of the source's tensor within its layer's mixer.
        axis: "rows" or "columns".
        runs: (first index in the new tensor, first in the source's, how many) of every consecutive run.
    """

    source: str
    axis: str
    runs: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class TensorReport:
    """One tensor of a new mixer.

    Attributes:
        name: within the mixer.
        counts: of its weights; none of them is `left`.
        inherited: where the copied and repeated ones come from.
    """

    name: str
    counts: Counts
    inherited: tuple[Inherited, ...] = ()


@dataclass(frozen=True)
class LayerReport:
    """The mixer of one layer.

    Attributes:
        layer: its number; source_layer: that of the source's layer whose place it takes.
        before, after: the layers as the patterns write them.
        how: "copied" (the same layer), "window" (only the window differs), "options" (only options without weights
            differ), "inherited" (in part), or "new".
        counts: of all its mixer's weights.
        tensors: the mixer's tensors.
        left: the source's tensors that were not, or not wholly, taken, by name, with how many weights were left; none
            where an earlier layer of the new model has the same source layer.
    """

    layer: int
    source_layer: int
    before: str
    after: str
    how: str
    counts: Counts
    tensors: tuple[TensorReport, ...]
    left: dict[str, int]


@dataclass(frozen=True)
class Report:
    """A conversion.

    Attributes:
        source: the folder that was read.
        pattern_before, pattern: of the source and of the new model, in canonical form.
        inherit: "none" or "qkvo".
        layers: the mixers, layer by layer.
        parts: everything but the mixers, by part: vision, embeddings, head, mlps, norms, and what the source holds
            beyond the layers that were asked for.
    """

    source: str
    pattern_before: str
    pattern: str
    inherit: str
    layers: tuple[LayerReport, ...]
    parts: dict[str, Counts] = field(default_factory=dict)

    @property
    def mixers(self) -> Counts:
        """Of all layers' mixers."""
        return _sum(layer.counts for layer in self.layers)

    @property
    def total(self) -> Counts:
        """Of the whole model."""
        return self.mixers + _sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "source": self.source,
            "pattern_before": self.pattern_before,
            "pattern": self.pattern,
            "inherit": self.inherit,
            "layers": [_layer_dict(layer) for layer in self.layers],
            "parts": {name: counts.to_dict() for name, counts in {**self.parts, "mixers": self.mixers}.items()},
            "total": self.total.to_dict(),
        }


def _sum(counts: Iterable[Counts]) -> Counts:
    return sum(counts, start=Counts())


def _layer_dict(layer: LayerReport) -> dict[str, Any]:
    tensors = [
        {
            "name": tensor.name,
            **{key: value for key, value in tensor.counts.to_dict().items() if key != "left"},
            "inherited": [dataclasses.asdict(part) for part in tensor.inherited],
        }
        for tensor in layer.tensors
    ]
    named = {key: getattr(layer, key) for key in ("layer", "source_layer", "before", "after", "how", "left")}
    return {**named, "counts": layer.counts.to_dict(), "tensors": tensors}
