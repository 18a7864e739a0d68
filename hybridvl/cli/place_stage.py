"""Stage I a for `hybridvl place`: the student's fit as a run folder, and teacher, student and data in this process."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hybridvl.ablation.recipes import merged_recipe, recipe_context
from hybridvl.checkpoints import save
from hybridvl.cli.messages import mistake_behind, with_path
from hybridvl.cli.recipe_check import check_fit
from hybridvl.cli.training import TrainingCLI
from hybridvl.data.module import ChatDataModule
from hybridvl.inference.processor import Processor
from hybridvl.layers.errors import ConfigError
from hybridvl.models.vlm import VisionLanguageModel
from hybridvl.pipeline.description import Pipeline, Stage
from hybridvl.pipeline.mappings import fit_words, read_mapping
from hybridvl.pipeline.processes import Ended, run_process
from hybridvl.pipeline.runner import fit_arguments, plan_steps, run_pipeline
from hybridvl.training.agreement import check_agreement
from hybridvl.training.base import Batch
from hybridvl.training.layer_distillation import LayerDistillation

# One process, which writes nothing.
_HERE = {
    "trainer.devices": 1,
    "trainer.num_nodes": 1,
    "trainer.strategy": "auto",
    "trainer.logger": False,
    "trainer.enable_progress_bar": False,
}


@dataclass(frozen=True)
class Recipe:
    """How the student is trained: files given with --config, and values by path over them."""

    files: tuple[Path, ...]
    values: Mapping[str, Any]

    def merged(self) -> dict[str, Any]:
        """What both come to."""
        return merged_recipe([read_mapping(path) for path in self.files], self.values)

    def context(self) -> int:
        """Tokens of the longest conversation."""
        default = inspect.signature(ChatDataModule).parameters["max_tokens"].default
        return recipe_context(self.merged()) or int(default)


class _Built(TrainingCLI):
    """Ends where the fit would begin."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing."""


def train_student(recipe: Recipe, folder: Path) -> Path:
    """The model of the student's run in FOLDER/layers, which is skipped if it is done and goes on if it was killed."""
    name = folder.name or folder.resolve().name
    root = folder.parent if folder.name else folder.resolve().parent
    pipeline = Pipeline(name, root, (Stage("layers", recipe.files, {"run.test": False, **recipe.values}, ()),))
    steps = plan_steps(pipeline)
    check_fit(fit_arguments(pipeline, steps[0], []), "stage")
    (run,) = run_pipeline(pipeline, _launch, say=lambda line: print(line, flush=True))
    return run.model


class Laboratory:
    """Teacher and student of a recipe, and its data, where the recipe wants them.

    Args:
        recipe: of the student.
        student: folder of its model.
    """

    def __init__(self, recipe: Recipe, student: str) -> None:
        for talkative in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(talkative).setLevel(logging.WARNING)
        values = {**recipe.values, "model.student.source": student, **_HERE}
        arguments = fit_words(recipe.files, values)
        check_fit(arguments, "search")
        try:
            built = _Built(arguments[0], arguments[1:])
        except ValueError as error:
            mistake = mistake_behind(error)
            if mistake is None:
                raise
            raise ConfigError(with_path(mistake)) from error
        assert isinstance(built.model, LayerDistillation)
        self._trainer, self._data = built.trainer, built.datamodule
        check_agreement(built.model.config, self._data)
        self.plugin = built.trainer.precision_plugin
        self.stage: LayerDistillation = built.model.eval()
        self.plugin.convert_module(self.stage)
        self.stage.to(built.trainer.strategy.root_device)

    def batches(self, each: int | None, default: int) -> tuple[list[Batch], list[Batch]]:
        """Validation batches, every other one for ranking and for validating.

        each: how many of each; None: `default`, or what there is.
        """
        loader = self._data.val_dataloader()
        found = list(islice(loader, 2 * (each or default)))
        self._data.teardown("validate")
        if len(found) < 2 * (each or 1):
            raise ConfigError(
                f"--batches: the validation split has {len(found)} batches; expected at least {2 * (each or 1)}, half "
                "of them to rank on and half to compare on (a smaller data.eval_batch_size makes more)"
            )
        return found[::2], found[1::2]

    def save(self, model: VisionLanguageModel, folder: Path) -> None:
        """Write a model with the tokenizer and the image settings of the recipe."""
        save(model, folder)
        Processor(self._data.chat, self._data.images, self._data.videos).save(folder)

    def to_device(self, batch: Batch) -> Batch:
        """A batch where the models are."""
        device = self._trainer.strategy.root_device
        moved = {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}
        converted: Batch = self.plugin.convert_input(moved)
        return converted


def _launch(arguments: list[str]) -> Ended:
    return run_process([sys.executable, "-m", "hybridvl", *arguments])
