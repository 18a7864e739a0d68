"""What the studies among the runs say: the order of labels, baselines, what is tuned, what was not started, claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from hybridvl.ablation.axes import label_of
from hybridvl.ablation.claims import Claim, read_claims
from hybridvl.ablation.report.cells import CellRuns, find_baselines
from hybridvl.ablation.report.labels import STUDY_LABEL, study_names
from hybridvl.ablation.report.runs import Collected, RunFolder
from hybridvl.ablation.study import combinations
from hybridvl.layers.errors import ConfigError

_MISSING_SHOWN = 10


@dataclass(frozen=True)
class FoundStudy:
    """A study's file, and the runs that are of it.

    Attributes:
        name: in the label that tells studies apart; "" where there is no other.
        values: what the file says.
        runs: of the study.
    """

    name: str
    values: Mapping[str, Any]
    runs: tuple[RunFolder, ...]

    @property
    def orders(self) -> dict[str, list[str]]:
        """The labels of each axis, in its order."""
        axes = self.values.get("axes")
        found = {}
        for name, axis in axes.items() if isinstance(axes, Mapping) else ():
            values = axis.get("values") if isinstance(axis, Mapping) else None
            if isinstance(values, Mapping | list):
                found[str(name)] = [label_of(value) for value in values]
            elif isinstance(axis, Mapping) and "range" in axis:
                found[str(name)] = []  # numbers, in their own order
        return found

    @property
    def tune(self) -> dict[str, str]:
        """The metric that decides, by axis that is tuned."""
        given = self.values.get("tune")
        return {str(axis): str(tag) for axis, tag in given.items()} if isinstance(given, Mapping) else {}

    @property
    def baseline(self) -> dict[str, str]:
        """Labels of what cells are compared with."""
        given = self.values.get("baseline")
        labels = {str(axis): label_of(label) for axis, label in given.items()} if isinstance(given, Mapping) else {}
        return {axis: label for axis, label in labels.items() if axis not in self.tune}

    @property
    def metrics(self) -> list[str]:
        """Tags that the study is about."""
        given = self.values.get("metrics")
        return [str(tag) for tag in given] if isinstance(given, list) else []

    @property
    def claims(self) -> list[Claim]:
        """What it claims."""
        return read_claims(self.values["claims"]) if self.values.get("claims") else []

    def own(self, cells: Sequence[CellRuns]) -> list[int]:
        """The indices of its cells."""
        return [index for index, cell in enumerate(cells) if not self.name or cell.labels.get(STUDY_LABEL) == self.name]

    def best_trial(self, cells: Sequence[CellRuns]) -> list[str]:
        """A line about the search, if it is one: the best of its cells by the validation, of those with all seeds."""
        search, seeds = self.values.get("search"), self.values.get("seeds")
        if not isinstance(search, Mapping) or not isinstance(seeds, list):
            return []
        metric, own = str(search.get("metric")), [cells[index] for index in self.own(cells)]
        means = [(fmean(found), cell) for cell in own if len(found := cell.values(metric).values()) == len(seeds)]
        if not means:
            return []
        value, best = (max if search.get("direction") == "max" else min)(means, key=lambda entry: entry[0])
        return [
            f"search: {best.name} is best by {metric} ({value:.4g}), which chose it among {len(means)}; "
            f"{len(own)} of {search.get('trials')} trials were chosen"
        ]

    def not_started(self) -> list[str]:
        """A line about its runs of which there is no trace, if there are any; nobody knows those of a search."""
        seeds, orders = self.values.get("seeds"), self.orders
        if not orders or not isinstance(seeds, list) or self.values.get("search"):
            return []
        excluded = [entry for entry in self.values.get("exclude") or () if isinstance(entry, Mapping)]
        left_out = [{str(key): label_of(value) for key, value in entry.items()} for entry in excluded]
        labels = combinations(orders, left_out)
        started = {(frozenset(run.labels.items()), run.seed) for run in self.runs}
        missing = [
            f"{', '.join(f'{key}={value}' for key, value in own.items())} with seed {seed}"
            for own in labels
            for seed in seeds
            if (frozenset(own.items()), seed) not in started
        ]
        if not missing:
            return []
        shown = "; ".join(missing[:_MISSING_SHOWN]) + ("; and others" if len(missing) > _MISSING_SHOWN else "")
        count = len(labels) * len(seeds)
        return [f"study {self.values.get('name')}: {len(missing)} of {count} runs were not started: {shown}"]


def found_studies(collected: Collected) -> list[FoundStudy]:
    """The studies among the runs, by their folders."""
    names = study_names(collected.runs)
    return [
        FoundStudy(names.get(folder, ""), values, tuple(run for run in collected.runs if run.study == folder))
        for folder, values in sorted(collected.studies.items())
    ]


def own_baselines(cells: Sequence[CellRuns], studies: Sequence[FoundStudy]) -> tuple[list[int | None], list[str]]:
    """For each cell the index of the one that its study compares it with, and notes where there is no such cell yet."""
    found: list[int | None] = [None] * len(cells)
    notes = []
    for study in studies:
        own = study.own(cells)
        try:
            there = find_baselines([cells[index] for index in own], study.baseline)
        except ConfigError as error:  # a study may begin with other cells
            notes.append(f"nothing is compared yet: {error}" + (f" (study {study.name})" if study.name else ""))
            continue
        for index, baseline in zip(own, there, strict=True):
            found[index] = None if baseline is None else own[baseline]
    return found, notes
