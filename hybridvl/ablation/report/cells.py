"""Runs grouped to cells, and what each cell's runs came to, with intervals over seeds and differences to a baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hybridvl.ablation.report.labels import MISSING, STUDY_LABEL, differing, labelled, natural, short_names
from hybridvl.ablation.report.runs import DONE, RunFolder
from hybridvl.ablation.statistics import LEVEL, Difference, Interval, Method, holm, mean_interval, paired_difference
from hybridvl.layers.errors import ConfigError

_OTHERS = 6  # settings that a note names


@dataclass(frozen=True)
class CellRuns:
    """Runs that differ in nothing but their seed.

    Attributes:
        labels: what tells the cell from others.
        name: the labels as one line.
        runs: all of them, whatever became of them.
        used: the run of each seed that counts: of runs of one seed the newest that is done. Runs that do not say their
            seed count each on their own, as -1, -2 and so on.
        passed_over: runs that are done but do not count, and why.
    """

    labels: Mapping[str, str]
    name: str
    runs: tuple[RunFolder, ...]
    used: Mapping[int, RunFolder]
    passed_over: tuple[tuple[RunFolder, str], ...] = ()

    def values(self, metric: str) -> dict[int, float]:
        """The metric by seed, of those runs that count and have it; below 0 for runs that do not say their seed."""
        return {seed: run.metrics[metric] for seed, run in self.used.items() if metric in run.metrics}

    def section(self, *keys: str) -> Mapping[str, Any]:
        """A mapping in the recipe of its runs that count, such as that of data.task; {} where there is none."""
        run = next(iter(self.used.values()), None)
        return {} if run is None else run.section(*keys)

    def seeded(self, metric: str) -> dict[int, float]:
        """The same of runs that say their seed: others are no pair to any."""
        return {seed: value for seed, value in self.values(metric).items() if seed >= 0}


@dataclass(frozen=True)
class Result:
    """A metric of a cell.

    Attributes:
        values: by seed.
        interval: of their mean.
        difference: to the baseline, seed by seed; None without a baseline and for the baseline itself.
        p_corrected: p value of the difference by Holm, over all cells that this metric was compared in; NaN if none.
    """

    values: Mapping[int, float]
    interval: Interval
    difference: Difference | None = None
    p_corrected: float = math.nan


@dataclass(frozen=True)
class Settings:
    """How runs are compared.

    Attributes:
        baseline: labels of what cells are compared with, see `find_baselines`; empty: no comparison.
        interval: of means and differences, see `hybridvl.ablation.statistics`.
        level: of the intervals.
        tune: labels that are chosen for each cell by itself, by the metric that decides; see
            `hybridvl.ablation.report.tuning`.
    """

    baseline: Mapping[str, str] = field(default_factory=dict)
    interval: Method = "t"
    level: float = LEVEL
    tune: Mapping[str, str] = field(default_factory=dict)

    @property
    def percent(self) -> str:
        """ "95 %": the level, for people."""
        return f"{100 * self.level:g} %"


def group(
    runs: Sequence[RunFolder], orders: Mapping[str, Sequence[str]] | None = None
) -> tuple[list[CellRuns], list[str]]:
    """Cells in the order of their labels' values, and notes about labels for people.

    orders: of the values of labels; others are sorted, numbers by value.
    """
    labels, together = labelled(runs)
    keys = list(dict.fromkeys(key for found in labels for key in found))
    keys.sort(key=lambda key: list(orders or {}).index(key) if key in (orders or {}) else len(orders or {}))
    keys.sort(key=lambda key: key != STUDY_LABEL)
    found: dict[tuple[str, ...], list[RunFolder]] = {}
    for run, own in zip(runs, labels, strict=True):
        found.setdefault(tuple(own.get(key, MISSING) for key in keys), []).append(run)
    known = [list(map(str, (orders or {}).get(key, ()))) for key in keys]

    def order(values: tuple[str, ...]) -> list[Any]:
        return [
            (0, places.index(value), ()) if value in places else (1, 0, natural(value))
            for value, places in zip(values, known, strict=True)
        ]

    short = short_names(keys)
    cells = []
    for values in sorted(found, key=order):
        own = {key: value for key, value in zip(keys, values, strict=True) if value != MISSING}
        name = ", ".join(f"{short[key]}={value}" for key, value in own.items()) or "all runs"
        cells.append(_cell(own, name, found[values]))
    notes = []
    for key, others in together.items():
        more = f" and {len(others) - _OTHERS} more" if len(others) > _OTHERS else ""
        notes += [f"{key}: changes together with {', '.join(others[:_OTHERS])}{more}"] if others else []
    return cells, notes


def find_baselines(cells: Sequence[CellRuns], labels: Mapping[str, str]) -> list[int | None]:
    """For each cell the index of the one it is compared with: that has some labels, and the cell's own otherwise.

    None for the cells that have those labels themselves, where there is no such cell, and without labels. A label's
    key may be given by the short name that cells have.

    Raises:
        ConfigError: a label that no cell has.
    """
    if not labels:
        return [None] * len(cells)
    wanted = _labels("baseline", cells, labels)
    place = {frozenset(cell.labels.items()): index for index, cell in enumerate(cells)}
    found = [place.get(frozenset({**cell.labels, **wanted}.items())) for cell in cells]
    return [None if there == index else there for index, there in enumerate(found)]


def find_cell(cells: Sequence[CellRuns], labels: Mapping[str, str]) -> int:
    """The index of the one cell that has some labels; ConfigError unless there is exactly one."""
    wanted = _labels("cell", cells, labels)
    fitting = [index for index, cell in enumerate(cells) if wanted.items() <= cell.labels.items()]
    if len(fitting) != 1:
        said = ", ".join(f"{key}={value}" for key, value in labels.items()) or "no label"
        names = "; ".join(cells[index].name for index in fitting) or "; ".join(cell.name for cell in cells)
        raise ConfigError(f"cell: {said} fits {len(fitting)} cells; expected labels that fit one of {names}")
    return fitting[0]


def label_key(place: str, cells: Sequence[CellRuns], given: str) -> str:
    """The whole key of a label that is given by it or by the short name that cells have; ConfigError if none is."""
    keys = list(dict.fromkeys(key for cell in cells for key in cell.labels))
    by_short = {short: key for key, short in short_names(keys).items()}
    key = given if given in keys else by_short.get(given)
    if key is None:
        raise ConfigError(f"{place}: {given}: no label; the labels are {', '.join(keys) or 'none'}")
    return key


def compare_metric(
    cells: Sequence[CellRuns], metric: str, baselines: Sequence[int | None], settings: Settings
) -> list[Result]:
    """The metric of every cell, compared with that of its baseline."""
    values = [cell.values(metric) for cell in cells]
    pairs = [cell.seeded(metric) for cell in cells]
    differences = [
        None if there is None or not own else paired_difference(own, pairs[there], settings.interval, settings.level)
        for own, there in zip(pairs, baselines, strict=True)
    ]
    corrected = holm([math.nan if difference is None else difference.p for difference in differences])
    return [
        Result(own, mean_interval(list(own.values()), settings.interval, settings.level), difference, p)
        for own, difference, p in zip(values, differences, corrected, strict=True)
    ]


def _labels(place: str, cells: Sequence[CellRuns], labels: Mapping[str, str]) -> dict[str, str]:
    """Labels by their whole keys; ConfigError for one that no cell has."""
    wanted = {}
    for given, value in labels.items():
        key = label_key(place, cells, given)
        values = list(dict.fromkeys(cell.labels.get(key, MISSING) for cell in cells))
        if value not in values:
            raise ConfigError(f"{place}: {given}: {value!r}; no run has it, there are {', '.join(values)}")
        wanted[key] = value
    return wanted


def _cell(labels: Mapping[str, str], name: str, runs: Sequence[RunFolder]) -> CellRuns:
    used: dict[int, RunFolder] = {}
    passed_over = []
    nameless = -1
    for run in sorted((run for run in runs if run.status == DONE), key=lambda run: (run.started, run.folder)):
        seed = run.seed
        if seed is None:
            seed, nameless = nameless, nameless - 1
        if seed in used:
            passed_over.append((used[seed], _repeated(used[seed], run)))
        used[seed] = run
    return CellRuns(labels, name, tuple(runs), dict(sorted(used.items())), tuple(passed_over))


def _repeated(older: RunFolder, newer: RunFolder) -> str:
    keys = [key for key in differing([older.config, newer.config]) if not key.startswith("run.")]
    also = f"; the two differ in {', '.join(keys)}" if keys else ""
    return f"done, but {newer.name} has the same labels and seed and is newer{also}"
