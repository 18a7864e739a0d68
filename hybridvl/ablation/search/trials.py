"""The trials of a search, as Optuna keeps them in a journal in the study's folder that several sweeps share."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState, create_trial

from hybridvl.ablation.records import one_at_a_time
from hybridvl.ablation.search.sampling import CellSampler, Labels, distributions, labels_of
from hybridvl.ablation.study import Study
from hybridvl.layers.errors import ConfigError

JOURNAL = "search.journal"

_NAME = "search"  # the same for all, as brackets of hyperband depend on it
_REPEATS = "repeats"  # number of the trial that another one stands for
_CAME_THROUGH = "came_through"  # of a trial whose first run was not given up
_RESOURCES = "resources"  # optimizer steps of the first validation and of the whole fit
_REDUCTION = 3  # of successive halving: one in so many goes on

State = Literal["running", "complete", "pruned", "failed"]
Ending = float | Literal["pruned", "failed"]
"""Of a trial: its value, or how it came to none."""

_STATES: dict[TrialState, State] = {
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


@dataclass(frozen=True)
class Trial:
    """One cell that was chosen.

    Attributes:
        number: Optuna's.
        labels: by axis.
        state: as it was told.
        value: of the metric; None where it is not known.
        given_up: optimizer step at which it was pruned; None for others.
    """

    number: int
    labels: Labels
    state: State
    value: float | None
    given_up: int | None = None


@dataclass(frozen=True)
class Point:
    """The metric at one validation.

    Attributes:
        step: optimizer steps so far.
        steps: of the whole fit; None where it has no end.
        value: of the metric.
    """

    step: int
    steps: int | None
    value: float


class Trials:
    """Chosen one after another under a lock, so that no two sweeps choose the same.

    Args:
        study: a study with a search.
        folder: where the journal lies; None: nothing is written, for a look at what would be chosen.

    Raises:
        ConfigError: the journal cannot be read or written.
    """

    def __init__(self, study: Study, folder: Path | None) -> None:
        assert study.search is not None
        self._plan, self._search = study, study.search
        self._folder = folder
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._storage: BaseStorage = InMemoryStorage()
        with self._locked():
            if folder is not None:
                path = folder / JOURNAL
                self._storage = JournalStorage(JournalFileBackend(str(path), _NoLock(str(path))))
            self._optuna = optuna.create_study(
                storage=self._storage,
                study_name=_NAME,
                direction="maximize" if self._search.direction == "max" else "minimize",
                load_if_exists=True,
            )
        self._id = self._storage.get_study_id_from_name(_NAME)

    def all(self) -> list[Trial]:
        """Those that were chosen, in that order."""
        with self._locked():
            later = {found.user_attrs.get(_REPEATS): found for found in self._optuna.get_trials(False)}
            return [_told(later.get(trial.number, trial), trial.number) for trial in self._whole()]

    def ask(self) -> Trial | None:
        """Choose one more; None when there are as many as the search has."""
        with self._locked():
            whole = self._whole()
            numbers = {trial.number for trial in whole}
            for trial in self._optuna.get_trials(False, states=(TrialState.RUNNING,)):
                if trial.number not in numbers:  # a sweep was killed while it chose
                    self._optuna.tell(trial.number, state=TrialState.FAIL)
            if len(whole) >= self._search.trials:
                return None
            axes, baseline = self._plan.axes, self._plan.baseline
            self._optuna.sampler = CellSampler(
                self._search,
                axes,
                self._plan.exclude,
                len(whole),
                {frozenset(labels_of(trial.params).items()) for trial in whole},
                {axis.name: baseline[axis.name] for axis in axes} if len(baseline) == len(axes) else None,
            )
            asked = self._optuna.ask(distributions(axes))
            return Trial(asked.number, labels_of(asked.params), "running", None)

    def judge(self, trial: Trial, curve: Sequence[Point], has_ended: bool) -> Point | None:
        """Report validations that are new; returns the one at which the trial was given up now, if there is one.

        Nothing is given up at its last step, and no trial that has been told or that came through its first run.

        Args:
            trial: one that was chosen.
            curve: validations of its first run, in order.
            has_ended: whether that run is through.
        """
        with self._locked():
            number = self._storage.get_trial_id_from_study_id_trial_number(self._id, trial.number)
            known = self._storage.get_trial(number)
            if known.state != TrialState.RUNNING or _CAME_THROUGH in known.user_attrs:
                return None
            pruner = self._pruner(curve)
            for point in curve:
                if known.last_step is not None and point.step < known.last_step:
                    continue
                if point.step not in known.intermediate_values:
                    self._storage.set_trial_intermediate_value(number, point.step, point.value)
                    known = self._storage.get_trial(number)
                is_last = point.steps is not None and point.step >= point.steps
                if not is_last and pruner.prune(self._optuna, known):
                    self._optuna.tell(trial.number, state=TrialState.PRUNED)
                    return point
            if has_ended:
                self._storage.set_trial_user_attr(number, _CAME_THROUGH, True)
        return None

    def tell(self, trial: Trial, value: Ending) -> None:
        """Say how a trial ended, unless that is known; one that had failed may have come to a value after all."""
        with self._locked():
            known = self._optuna.get_trials(False)[trial.number]
            if known.state == TrialState.RUNNING and isinstance(value, str):
                state = TrialState.PRUNED if value == "pruned" else TrialState.FAIL
                self._optuna.tell(trial.number, state=state)
            elif known.state == TrialState.RUNNING:
                self._optuna.tell(trial.number, float(value))
            elif known.state == TrialState.FAIL and not isinstance(value, str) and not self._is_repeated(trial):
                # Optuna does not change what was told.
                again = create_trial(
                    value=float(value),
                    params=known.params,
                    distributions=known.distributions,
                    user_attrs={_REPEATS: trial.number},
                    intermediate_values=known.intermediate_values,
                )
                self._optuna.add_trial(again)

    def _whole(self) -> list[FrozenTrial]:
        """Trials that were chosen to the end: a sweep that is killed may leave half of one."""
        trials = self._optuna.get_trials(False)
        names = {axis.name for axis in self._plan.axes}
        return [trial for trial in trials if trial.params.keys() == names and _REPEATS not in trial.user_attrs]

    def _is_repeated(self, trial: Trial) -> bool:
        return any(other.user_attrs.get(_REPEATS) == trial.number for other in self._optuna.get_trials(False))

    def _pruner(self, curve: Sequence[Point]) -> BasePruner:
        """The pruner that was asked for; successive halving begins when a first validation has told its step."""
        if self._search.pruner == "median":
            return MedianPruner(n_startup_trials=self._search.startup)
        if self._search.pruner == "none":
            return NopPruner()
        resources = self._optuna.user_attrs.get(_RESOURCES)
        if resources is None and curve:
            if curve[0].steps is None:
                raise ConfigError(
                    f"{self._plan.path}: search.pruner: 'hyperband' deals out the steps of a fit, and this one has no "
                    "end in steps; expected trainer.max_steps, or trainer.max_epochs with data that ends, in a study "
                    "of another name, or another pruner"
                )
            resources = [curve[0].step, curve[0].steps]
            self._optuna.set_user_attr(_RESOURCES, resources)
        if resources is None:
            return NopPruner()
        return HyperbandPruner(resources[0], resources[1], _REDUCTION)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among all sweeps of the study; mistakes of the file system and of the journal become ConfigErrors."""
        if self._folder is None:
            yield
            return
        path = self._folder / JOURNAL
        with one_at_a_time(self._folder):
            try:
                _mend(path)
                yield
            except json.JSONDecodeError as error:
                raise ConfigError(f"{path}: is damaged ({error}); expected what a sweep has written") from error
            except OSError as error:
                raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error


class _NoLock(JournalFileOpenLock):
    """In place of the journal's own lock, whose leftovers would stop others: all is written within `Trials._locked`."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def _mend(path: Path) -> None:
    """Cut off what a process that was killed has written of a line."""
    content = path.read_bytes() if path.exists() else b""
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def _told(found: FrozenTrial, number: int) -> Trial:
    given_up = found.last_step if found.state == TrialState.PRUNED else None
    return Trial(number, labels_of(found.params), _STATES[found.state], found.value, given_up)
