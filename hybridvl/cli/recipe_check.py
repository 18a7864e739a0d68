"""Recipes as the command line reads them, without building anything: their mistakes, and the keys that they know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jsonargparse import Namespace
from omegaconf.errors import OmegaConfBaseException

from hybridvl.ablation.cells import Run
from hybridvl.ablation.keys import check_keys
from hybridvl.ablation.study import Study
from hybridvl.cli.messages import known_keys
from hybridvl.cli.training import TrainingCLI
from hybridvl.layers.errors import ConfigError, within


class _ReadOnly(TrainingCLI):
    """Ends where models would be made."""

    def _parse_ckpt_path(self) -> None:
        """The run itself will look at its checkpoint."""

    def _set_seed(self) -> None:
        """Nothing is drawn."""

    def instantiate_classes(self) -> None:
        """Nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing."""


class _Known(Exception):
    """The keys are known."""

    def __init__(self, keys: set[str]) -> None:
        super().__init__()
        self.keys = keys


class _Keys(_ReadOnly):
    """Ends where the recipe would be read."""

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Look at the parser alone."""
        raise _Known(known_keys(self._subcommand_parsers[self._command]))


def check_fit(arguments: Sequence[str], not_started: str) -> Namespace:
    """Have the command line read what follows `hybridvl` to start a run; its mistakes are printed or ConfigErrors.

    not_started: what has not been started then, for the message. Returns the settings of the trainer.
    """
    try:
        return _ReadOnly(arguments[0], arguments[1:]).config[arguments[0]].trainer
    except SystemExit as refused:
        raise ConfigError(f"refused for the reason above; no {not_started} was started") from refused
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from error


def fit_keys(arguments: Sequence[str]) -> set[str]:
    """The keys that a recipe can have; which they are depends on its run.stage."""
    try:
        _Keys(arguments[0], arguments[1:])
    except _Known as found:
        return found.keys
    raise AssertionError("the parser was not asked")


def check_study(study: Study, runs: Sequence[Run]) -> None:
    """Raise ConfigError for what a fit would refuse: keys that are none, and values that do not fit.

    Every value of every axis is looked at once, not in every combination.
    """
    check_keys(study, fit_keys(runs[0].arguments))
    seen: set[tuple[str, str]] = set()
    for run in runs:
        labels = set(run.cell.labels.items())
        if run is runs[0] or not labels <= seen:
            seen |= labels
            with within(f"{study.path}: cell {run.cell.name}"):
                _require_run_folder(check_fit(run.arguments, "run"))


def _require_run_folder(trainer: Namespace) -> None:
    """Refuse what keeps a fit from leaving a run folder that says when it was done: it would run again for ever."""
    if trainer.get("logger") not in (None, True):
        raise ConfigError(f"trainer.logger: {trainer.logger}; expected null, as the run folder is its own logger's")
    if trainer.get("fast_dev_run"):
        raise ConfigError(f"trainer.fast_dev_run: {trainer.fast_dev_run}; expected false, as such a run leaves nothing")
