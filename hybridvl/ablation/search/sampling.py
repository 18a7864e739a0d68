"""How the labels of a trial are drawn: by one of Optuna's samplers, from a seed of the trial's own, each cell once."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import Study as OptunaStudy
from optuna.trial import FrozenTrial

from hybridvl.ablation.axes import Axis, is_excluded, label_of
from hybridvl.ablation.ranges import Range
from hybridvl.ablation.search.space import Search

Labels = dict[str, str]

_ATTEMPTS = 10  # draws before a new cell is looked for in another way
_MANY_ATTEMPTS = 10_000  # draws before all cells are listed, where there are more than that


def distributions(axes: Sequence[Axis]) -> dict[str, BaseDistribution]:
    """Optuna's description of what each axis can be: numbers for ranges, labels for values."""
    return {axis.name: _distribution(axis) for axis in axes}


def labels_of(params: Mapping[str, Any]) -> Labels:
    """The labels that the parameters of one of Optuna's trials stand for."""
    return {name: label_of(value) for name, value in params.items()}


def trial_seed(seed: int, index: int, attempt: int = 0) -> int:
    """What the sampler of one trial draws from: the same in whatever process, and however often it was interrupted."""
    return int(np.random.SeedSequence([seed, index, attempt]).generate_state(1)[0])


class CellSampler(BaseSampler):
    """Draws the parameters of one trial, such that its cell is neither excluded nor one that a trial has already.

    Args:
        search: which sampler, and its seed.
        axes: what is drawn.
        exclude: labels by axis of what is left out.
        index: of the trial in the search.
        taken: cells of earlier trials, as sets of their labels by axis.
        first: the labels of the first trial; None: they are drawn, too.
    """

    def __init__(
        self,
        search: Search,
        axes: Sequence[Axis],
        exclude: Sequence[Mapping[str, str]],
        index: int,
        taken: Set[frozenset[tuple[str, str]]],
        first: Labels | None,
    ) -> None:
        self._search = search
        self._ranges = {axis.name: axis.range for axis in axes if axis.range is not None}
        self._values = {axis.name: list(axis.values) for axis in axes if axis.range is None}
        self._space = distributions(axes)
        self._exclude = exclude
        self._index = index
        self._taken = taken
        self._first = first

    def infer_relative_search_space(self, study: OptunaStudy, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All axes: they are drawn together."""
        return self._space

    def sample_relative(
        self, study: OptunaStudy, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A number or label for every axis."""
        if self._index == 0 and self._first is not None:
            return {name: self._param(name, label) for name, label in self._first.items()}
        for attempt in range(_ATTEMPTS):
            params = self._drawn(study, trial, trial_seed(self._search.seed, self._index, attempt))
            if self._is_new(params):
                return params
        return next(params for params in self._others(study, trial) if self._is_new(params))

    def sample_independent(
        self, study: OptunaStudy, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Never asked for: all axes are drawn together."""
        raise AssertionError(param_name)

    def _drawn(self, study: OptunaStudy, trial: FrozenTrial, seed: int) -> dict[str, Any]:
        """What the sampler that was asked for draws, as numbers that can be read."""
        sampler: BaseSampler = RandomSampler(seed)
        if self._search.sampler == "tpe":
            sampler = TPESampler(seed=seed, n_startup_trials=self._search.startup)
        together = sampler.infer_relative_search_space(study, trial)
        params = sampler.sample_relative(study, trial, together)
        for name, distribution in self._space.items():
            if name not in params:
                params[name] = sampler.sample_independent(study, trial, name, distribution)
        return {name: self._nearest(name, params[name]) for name in self._space}

    def _others(self, study: OptunaStudy, trial: FrozenTrial) -> Iterator[dict[str, Any]]:
        """Cells in a random order of labels, of ranges first drawn numbers and then all."""
        draws = random.Random(trial_seed(self._search.seed, self._index, _ATTEMPTS))
        for _ in range(_MANY_ATTEMPTS if math.prod(len(own) for own in self._values.values()) > _MANY_ATTEMPTS else 0):
            sampler = RandomSampler(draws.randrange(2**32))
            yield {
                name: self._nearest(name, sampler.sample_independent(study, trial, name, one))
                for name, one in self._space.items()
            }
        labels = [dict(zip(self._values, chosen, strict=True)) for chosen in itertools.product(*self._values.values())]
        draws.shuffle(labels)
        left = [own for own in labels if not is_excluded(own, self._exclude)]
        for own in left:
            for _ in range(_ATTEMPTS if self._ranges else 1):
                sampler = RandomSampler(draws.randrange(2**32))
                drawn = {
                    name: self._nearest(name, sampler.sample_independent(study, trial, name, self._space[name]))
                    for name in self._ranges
                }
                yield {**own, **drawn}
        for own in left:
            for numbers in itertools.product(*(_values(one) for one in self._ranges.values())):
                yield {**own, **dict(zip(self._ranges, numbers, strict=True))}

    def _is_new(self, params: Mapping[str, Any]) -> bool:
        labels = labels_of(params)
        return not is_excluded(labels, self._exclude) and frozenset(labels.items()) not in self._taken

    def _nearest(self, name: str, value: Any) -> Any:
        return self._ranges[name].nearest(value) if name in self._ranges else value

    def _param(self, name: str, label: str) -> Any:
        return self._ranges[name].value(label) if name in self._ranges else label


def _distribution(axis: Axis) -> BaseDistribution:
    numbers = axis.range
    if numbers is None:
        return CategoricalDistribution(list(axis.values))
    if numbers.is_whole:
        return IntDistribution(int(numbers.low), int(numbers.high), numbers.log, int(numbers.step or 1))
    return FloatDistribution(numbers.low, numbers.high, numbers.log, numbers.step)


def _values(numbers: Range) -> Iterator[float]:
    """All values of a range that is counted, and nothing of others."""
    for number in range(numbers.count or 0):
        yield numbers.nearest(numbers.low + number * (numbers.step or 1))
