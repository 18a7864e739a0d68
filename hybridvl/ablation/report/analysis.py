"""All that a report says, before it is written: cells, results of every metric, costs, what went wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hybridvl.ablation.claims import Claim, read_claims
from hybridvl.ablation.report.cells import (
    Cell,
    Result,
    Settings,
    compare_metric,
    find_baselines,
    group,
)
from hybridvl.ablation.report.costs import Costs, cell_costs
from hybridvl.ablation.report.labels import text
from hybridvl.ablation.report.metrics import chosen_metrics, logged_metrics
from hybridvl.ablation.report.runs import DONE, Collected, Run
from hybridvl.ablation.report.tuning import tuned
from hybridvl.ablation.report.verdicts import Judged, judge
from hybridvl.ablation.study import combinations
from hybridvl.layers.errors import ConfigError, within

_MISSING_SHOWN = 10


@dataclass(frozen=True)
class Analysis:
    """What a report says.

    Attributes:
        runs: all of them.
        cells: groups of runs that differ in their seed alone.
        settings: how they are compared.
        baselines: for each cell the index of the cell that it is compared with, or None.
        metrics: those that the report is about.
        logged: every metric that any run has.
        results: of each cell, by metric; of all that were logged.
        costs: of each cell.
        claims: with their verdicts.
        notes: what a reader must know about labels and settings.
        warnings: files that could not be read, numbers that are none.
    """

    runs: Sequence[Run]
    cells: Sequence[Cell]
    settings: Settings
    baselines: Sequence[int | None]
    metrics: Sequence[str]
    logged: Sequence[str]
    results: Mapping[str, Sequence[Result]]
    costs: Sequence[Costs]
    claims: Sequence[Judged]
    notes: Sequence[str]
    warnings: Sequence[str]

    @property
    def statuses(self) -> dict[str, int]:
        """How many runs ended how, those that are done first."""
        counts = Counter(run.status for run in self.runs)
        return {name: counts[name] for name in sorted(counts, key=lambda name: (name != DONE, name))}

    @property
    def left_out(self) -> list[tuple[Run, str]]:
        """Runs that no mean is taken over, each with the reason."""
        out = [(run, f"{run.status}: {run.reason}") for run in self.runs if run.status != DONE]
        return out + [entry for cell in self.cells for entry in cell.passed_over]


def analyse(
    collected: Collected,
    settings: Settings,
    metrics: Sequence[str] = (),
    context: int | None = None,
    measured: Sequence[int] = (),
    claims: Sequence[Claim] = (),
) -> Analysis:
    """Group runs to cells and compare them.

    Args:
        collected: the runs, and the studies they belong to, whose order of labels, metrics and baseline are used where
            nothing else is asked for.
        settings: how they are compared; without a baseline that of the studies is taken.
        metrics: what the report is about; none: the studies', or the share of exact answers.
        context: tokens for which FLOPs and bytes of state are given; None: the longest sample of any run.
        measured: tokens after which a decode step of every model is timed.
        claims: to be judged, beside those of the studies.

    Raises:
        ConfigError: a metric that no run logged, a baseline that no cell has, no run that was started, runs of several
            studies with the same labels.
    """
    runs = collected.runs
    orders = {key: values for study in collected.studies for key, values in _orders(study).items()}
    cells, notes = group(runs, orders)
    if len(collected.studies) > 1:
        _refuse_mixed(cells)
    tune = dict(settings.tune) or _tuned_axes(collected.studies)
    if settings.tune or set(tune.values()) <= set(logged_metrics(runs)):
        cells, chosen = tuned(cells, runs, tune)
        notes += chosen
    else:
        notes.append(f"nothing is tuned yet: no run logged {' or '.join(tune.values())}")
    settings, baselines = _compared_with(cells, settings, collected.studies, tune, notes)
    logged = logged_metrics(runs)
    wanted = list(metrics)
    if not wanted:
        # A study names its metrics before any run has logged them.
        named = dict.fromkeys(str(name) for study in collected.studies for name in study.get("metrics") or ())
        wanted = [name for name in named if name in logged]
        notes += [f"{name}: no run logged it yet" for name in named if name not in logged]
    with within("--metrics" if metrics else ""):
        shown = chosen_metrics(runs, wanted)
    missing = [line for study in collected.studies for line in _not_started(study, runs)]
    notes += missing
    if not shown:
        notes.append("no run has logged any metric yet")
    warnings = list(collected.problems)
    warnings += [f"{run.folder}: {problem}" for run in runs for problem in run.problems]
    own = [claim for study in collected.studies if study.get("claims") for claim in read_claims(study["claims"])]
    counted = [length for claim in (*own, *claims) for part in claim.parts for length in part.tokens or ()]
    costs = cell_costs(cells, context, measured, counted)
    verdicts = judge(claims, runs, cells, costs, settings)
    judged = judge(own, runs, cells, costs, settings, unfinished=True)
    if not missing and all(run.status in (DONE, "failed") for run in runs):
        warnings += _mistakes(judged)
    return Analysis(
        runs=runs,
        cells=cells,
        settings=settings,
        baselines=baselines,
        metrics=shown,
        logged=logged,
        results={name: compare_metric(cells, name, baselines, settings) for name in logged},
        costs=costs,
        claims=[*judged, *verdicts],
        notes=notes,
        warnings=warnings,
    )


def _orders(study: Mapping[str, Any]) -> dict[str, list[str]]:
    """The values of a study's axes, in its order."""
    axes = study.get("axes")
    found = {}
    for name, axis in axes.items() if isinstance(axes, Mapping) else ():
        values = axis.get("values") if isinstance(axis, Mapping) else None
        if isinstance(values, Mapping | list):
            found[str(name)] = [text(value) for value in values]
    return found


def _tuned_axes(studies: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    given = [study.get("tune") for study in studies]
    return {str(key): str(tag) for entry in given if isinstance(entry, Mapping) for key, tag in entry.items()}


def _not_started(study: Mapping[str, Any], runs: Sequence[Run]) -> list[str]:
    """A line about those runs of a study of which there is no trace, if there are any."""
    orders, seeds = _orders(study), study.get("seeds")
    if not orders or not isinstance(seeds, list):
        return []
    excluded = [entry for entry in study.get("exclude") or () if isinstance(entry, Mapping)]
    left_out = [{str(key): text(value) for key, value in entry.items()} for entry in excluded]
    labels = combinations(orders, left_out)
    started = {(frozenset(run.labels.items()), run.seed) for run in runs}
    missing = [
        f"{', '.join(f'{key}={value}' for key, value in own.items())} with seed {seed}"
        for own in labels
        for seed in seeds
        if (frozenset(own.items()), seed) not in started
    ]
    if not missing:
        return []
    shown = "; ".join(missing[:_MISSING_SHOWN]) + ("; and others" if len(missing) > _MISSING_SHOWN else "")
    return [f"study {study.get('name')}: {len(missing)} of {len(labels) * len(seeds)} runs were not started: {shown}"]


def _compared_with(
    cells: Sequence[Cell],
    settings: Settings,
    studies: Sequence[Mapping[str, Any]],
    tune: Mapping[str, str],
    notes: list[str],
) -> tuple[Settings, list[int | None]]:
    """The settings with the baseline of the studies, if they have none, and the baseline of every cell."""
    if settings.baseline:
        return settings, find_baselines(cells, settings.baseline)
    given = {key: value for key, value in _baseline(studies).items() if key not in tune}
    settings = replace(settings, baseline=given)
    try:
        return settings, find_baselines(cells, given)
    except ConfigError as error:  # a study may begin with other cells
        notes.append(f"nothing is compared yet: {error}")
        return settings, [None] * len(cells)


def _mistakes(judged: Sequence[Judged]) -> list[str]:
    """What claims name that is not there and will not come any more."""
    return [f"claim {claim.text!r}: {found.reason}" for claim in judged for found in claim.findings if found.mistake]


def _refuse_mixed(cells: Sequence[Cell]) -> None:
    """Raise ConfigError where a mean would be over runs of several studies: equal labels say nothing of the rest."""
    for cell in cells:
        places = sorted({str(run.folder.parent.parent) for run in cell.runs if run.labels})
        if len(places) > 1:
            raise ConfigError(
                f"cell {cell.name}: runs of several studies have these labels ({', '.join(places)}); expected one "
                "study in a report, or labels that tell them apart"
            )


def _baseline(studies: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    given = [study.get("baseline") for study in studies]
    found = [{str(k): text(v) for k, v in entry.items()} for entry in given if isinstance(entry, Mapping) and entry]
    if not found:
        return {}
    if any(entry != found[0] for entry in found):
        raise ConfigError(f"baseline: the studies have several, {found}; expected one, say which with --baseline")
    return found[0]
