"""The section `run` of a recipe: where a run is kept, what is trained, how it is told apart from others."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hybridvl.layers.errors import ConfigError


@dataclass(frozen=True)
class RunConfig:
    """Where a run is kept: ROOT/NAME/VERSION.

    Attributes:
        name: name of the experiment.
        root: folder of all runs.
        version: folder of this run; null numbers them (version_0, version_1, ...).
        stage: what is trained, and so which settings `model` takes: supervised (SupervisedTuning), layers
            (LayerDistillation) or logits (LogitDistillation).
        test: whether a fit ends with the test.
        threads: CPU threads of the main process; small models run fastest on 1. null leaves torch's choice.
        labels: what tells this run from others it is compared with, such as {ratio: 1/4}; TensorBoard's HParams page
            then shows these and the seed alone, instead of the usual settings.
        metrics: tags that the HParams page has beside them, such as [test/exact]; of none it has the usual ones.
    """

    name: str = "run"
    root: str = "runs"
    version: str | None = None
    stage: Literal["supervised", "layers", "logits"] = "supervised"
    test: bool = True
    threads: int | None = None
    labels: dict[str, str] = field(default_factory=dict)
    metrics: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"run.threads: {self.threads}; expected at least 1, or null")

    @property
    def folder(self) -> Path:
        """The folder of all versions."""
        return Path(self.root) / self.name
