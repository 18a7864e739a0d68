"""The search behind `hybridvl place`: what is asked for checked first, then layers ranked and candidates compared."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybridvl.ablation.placement.candidates import Budget, Layers, candidates, kept_within, placement_of
from hybridvl.ablation.placement.hybrids import Placement, assemble, kept_attention
from hybridvl.ablation.placement.measures import METRICS, Measures, layer_losses
from hybridvl.ablation.placement.outcome import Outcome, compare
from hybridvl.ablation.placement.ranking import LINEAR, Ranking, by_beam, by_probe, by_removal, by_scores
from hybridvl.ablation.recipes import recipe_dtype, resolved_section
from hybridvl.checkpoints import read_config
from hybridvl.cli.place_stage import Laboratory, Recipe
from hybridvl.conversion.target import target_config
from hybridvl.layers.errors import ConfigError, within
from hybridvl.models.config import ModelConfig
from hybridvl.pattern import parse_pattern
from hybridvl.pattern.core import Mixers
from hybridvl.plan.costs import Plan
from hybridvl.training.student import replaced_layers
from hybridvl.training.versions import versions

RANKS = ("loss", "probe", "removal", "beam")

_OWN = {
    "model.student.teacher": "the teacher is the first argument",
    "model.student.pattern": "the student's layers are --linear",
    "model.student.source": "a student that is there already is --student",
    "run.stage": "it is layers",
    "run.root": "the folder of everything is --out",
    "run.name": "the folder of everything is --out",
    "run.version": "the folder of everything is --out",
}
_BATCHES = 8  # validation batches for the rankings, and as many for the candidates, unless told otherwise


class Search:
    """A search for placements; what is wrong in it shows before anything is trained.

    Args:
        options: of the command line.
        values: flags for the recipe, by path.
    """

    def __init__(self, options: argparse.Namespace, values: Mapping[str, str]) -> None:
        for key in values:
            if key in _OWN:
                raise ConfigError(f"--{key}: not to be given here: {_OWN[key]}")
        for flag, given, known in (("metric", [options.metric], METRICS), ("rank", options.rank, RANKS)):
            for name in given:
                if name not in known:
                    raise ConfigError(f"--{flag}: {name!r}; expected one of {', '.join(known)}")
        for flag in ("beam", "batches", "context"):
            value = getattr(options, flag)
            if value is not None and value < 1:
                raise ConfigError(f"--{flag}: {value}; expected at least 1")
        self.options = options
        with within("TEACHER"):
            self.teacher = read_config(options.teacher)
        depth = len(parse_pattern(self.teacher.pattern, self.teacher.mixers))
        own = {"model.student.teacher": options.teacher, "run.stage": "layers"}
        self.recipe = Recipe(tuple(Path(name) for name in options.config), {**values, **own})
        self.mixers: Mixers | None = resolved_section(self.recipe.merged(), "model.student.mixers")
        self.layers = self._layers(depth)
        pattern = self.layers.pattern(LINEAR)
        self.recipe = Recipe(self.recipe.files, {**self.recipe.values, "model.student.pattern": pattern})
        self.budget = self._budget()
        self.count = self._count()
        self.also: dict[str, Placement] = {}
        for text in options.also or ():
            with within("--also"):
                self.also[text] = placement_of(parse_pattern(text, self.mixers), self.layers, self.count)

    def check_student(self, student: str) -> None:
        """Raise ConfigError unless a model's layers are those of --linear."""
        with within("--student"):
            found = read_config(student)
            wanted = self._model(LINEAR)
            depth = len(parse_pattern(found.pattern, found.mixers))
            if depth != len(self.layers.linear) or replaced_layers(found, wanted):
                raise ConfigError(
                    f"{student}: its pattern is {found.pattern!r}; expected {wanted.pattern!r}, as --linear says, with "
                    "the options that the recipe gives it"
                )

    def run(self, student: str, folder: Path) -> Outcome:
        """Rank the layers, compare the candidates on other samples, and write the best one as a model into a folder."""
        options = self.options
        laboratory = Laboratory(self.recipe, student)
        hybrids = assemble(laboratory.stage, options.teacher, options.attention, self.mixers)
        first, second = laboratory.batches(options.batches, _BATCHES)
        with laboratory.plugin.forward_context():
            measures = Measures(hybrids, first, options.metric, laboratory.to_device)
            rankings = [self._ranking(name, measures, laboratory) for name in dict.fromkeys(options.rank)]
            proposed = candidates(rankings, self.layers.chosen, self.count, self.also)
            plans = {placement: self._plan(placement) for placement in proposed}
            print(f"comparing    {len(proposed)} candidates", flush=True)
            others = Measures(hybrids, second, options.metric, laboratory.to_device)
            ranked_on = len(measures.scores([LINEAR])[LINEAR])
            outcome = compare(others, rankings, proposed, self.layers, plans, ranked_on)
        best = frozenset(outcome.winner.kept)
        laboratory.save(hybrids.model(best, self._model(best)), folder)
        return outcome

    def facts(self, student: str) -> dict[str, Any]:
        """What the search was made with, as plain values."""
        options, budget = self.options, self.budget
        return {
            "teacher": options.teacher,
            "teacher_pattern": self.teacher.pattern,
            "student": student,
            "linear": self.layers.linear[0],
            "attention": self.layers.attention,
            "keep": self.count,
            "budget": {"state_bytes": budget.state_bytes, "params": budget.params},
            "context": budget.context,
            "dtype": str(budget.dtype).removeprefix("torch."),
            **{name: getattr(options, name) for name in ("rank", "beam", "batches", "also")},
            "recipes": [str(path) for path in self.recipe.files],
            "values": dict(self.recipe.values),
            "versions": versions(),
        }

    def _ranking(self, name: str, measures: Measures, laboratory: Laboratory) -> Ranking:
        print(f"ranking      by {name}", flush=True)
        if name == "loss":
            how = laboratory.stage.loss, laboratory.stage.match
            return by_scores(name, layer_losses(measures.hybrids, measures.batches, *how, laboratory.to_device))
        if name == "beam":
            return by_beam(measures, self.options.beam)
        return by_probe(measures) if name == "probe" else by_removal(measures)

    def _layers(self, depth: int) -> Layers:
        linear, attention = (self._layer(flag) for flag in ("linear", "attention"))
        if linear == attention:
            raise ConfigError(f"--linear: {linear!r} is what --attention says; expected another layer")
        found = Layers((linear,) * depth, attention, (), self.mixers)
        chosen = replaced_layers(target_config(self.teacher, found.pattern(LINEAR), self.mixers), self.teacher)
        if len(chosen) < 2:
            raise ConfigError(
                f"--linear: {linear!r} is not the teacher's ({self.teacher.pattern}) in {len(chosen)} layers; expected "
                "at least 2 to choose from"
            )
        with within("--attention"):
            kept_attention(self.options.teacher, attention, chosen, self.mixers)
        return Layers(found.linear, attention, chosen, self.mixers)

    def _layer(self, flag: str) -> str:
        """One layer as patterns write it."""
        text = getattr(self.options, flag)
        with within(f"--{flag}"):
            known = target_config(self.teacher, text, self.mixers)
            layers = parse_pattern(text, known.mixers).layers
            if len(layers) != 1:
                raise ConfigError(f"{text!r} is {len(layers)} layers; expected one, such as gdn or swa(window=64)")
        return layers[0]

    def _budget(self) -> Budget:
        options = self.options
        context = options.context or self.recipe.context()
        return Budget(options.state_bytes, options.params, context, recipe_dtype(self.recipe.merged()))

    def _count(self) -> int:
        layers, keep = self.layers.chosen, self.options.keep
        if keep is None:
            plans = [self._plan(frozenset(layers[:count])) for count in range(len(layers) + 1)]
            with within("--budget"):
                return kept_within(plans, self.budget)
        if not 1 <= keep < len(layers):
            raise ConfigError(f"--keep: {keep}; expected 1 to {len(layers) - 1} of {len(layers)} layers")
        return int(keep)

    def _model(self, placement: Placement) -> ModelConfig:
        return target_config(self.teacher, self.layers.pattern(placement), self.mixers)

    def _plan(self, placement: Placement) -> Plan:
        return self.budget.plan(self._model(placement))
