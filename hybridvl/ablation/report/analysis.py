"""All that a report says, before it is written: cells, results of every metric, costs, what went wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hybridvl.ablation.claims import Claim
from hybridvl.ablation.report.cells import (
    CellRuns,
    Result,
    Settings,
    compare_metric,
    find_baselines,
    group,
)
from hybridvl.ablation.report.costs import CellCosts, costs_of_cells
from hybridvl.ablation.report.metrics import chosen_metrics, logged_metrics
from hybridvl.ablation.report.remarks import unlike, unpaired
from hybridvl.ablation.report.runs import DONE, Collected, RunFolder
from hybridvl.ablation.report.studies import FoundStudy, found_studies, own_baselines
from hybridvl.ablation.report.tuning import tuned
from hybridvl.ablation.report.verdicts import Judged, judge
from hybridvl.layers.errors import within


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

    runs: Sequence[RunFolder]
    cells: Sequence[CellRuns]
    settings: Settings
    baselines: Sequence[int | None]
    metrics: Sequence[str]
    logged: Sequence[str]
    results: Mapping[str, Sequence[Result]]
    costs: Sequence[CellCosts]
    claims: Sequence[Judged]
    notes: Sequence[str]
    warnings: Sequence[str]

    @property
    def statuses(self) -> dict[str, int]:
        """How many runs ended how, those that are done first."""
        counts = Counter(run.status for run in self.runs)
        return {name: counts[name] for name in sorted(counts, key=lambda name: (name != DONE, name))}

    @property
    def left_out(self) -> list[tuple[RunFolder, str]]:
        """Runs that no mean is taken over, each with the reason."""
        out = [(run, f"{run.status}: {run.reason}") for run in self.runs if run.status != DONE]
        return out + [entry for cell in self.cells for entry in cell.passed_over]

    @property
    def baseline_name(self) -> str:
        """What cells are compared with; "" where nothing is."""
        if all(index is None for index in self.baselines):
            return ""
        return ", ".join(f"{key}={value}" for key, value in self.settings.baseline.items()) or "its study's baseline"


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
        ConfigError: a metric that no run logged, a baseline that no cell has, no run that was started.
    """
    runs, studies = collected.runs, found_studies(collected)
    orders = {axis: labels for study in studies for axis, labels in study.orders.items()}
    cells, notes = group(runs, orders)
    notes += [line for study in studies for line in study.best_trial(cells)]
    warnings = [*collected.problems, *(f"{run.path}: {problem}" for run in runs for problem in run.problems)]
    warnings += unlike(cells)
    tune = dict(settings.tune) or {axis: tag for study in studies for axis, tag in study.tune.items()}
    if settings.tune or set(tune.values()) <= set(logged_metrics(runs)):
        cells, chosen = tuned(cells, runs, tune)
        notes += chosen
    else:
        notes.append(f"nothing is tuned yet: no run logged {' or '.join(tune.values())}")
    if settings.baseline:
        baselines = find_baselines(cells, settings.baseline)
    else:
        given = [study.baseline for study in studies]
        settings = replace(settings, baseline=given[0] if given and given.count(given[0]) == len(given) else {})
        baselines, missed = own_baselines(cells, studies)
        notes += missed
    notes += unpaired(cells) if any(index is not None for index in baselines) else []
    logged = logged_metrics(runs)
    shown = _shown(metrics, runs, studies, notes)
    missing = [line for study in studies for line in study.not_started()]
    notes += missing
    if not shown:
        notes.append("no run has logged any metric yet")
    counted = [
        length
        for claim in (*claims, *(claim for study in studies for claim in study.claims))
        for part in claim.parts
        for length in part.tokens or ()
    ]
    costs = costs_of_cells(cells, context, measured, counted)
    verdicts = judge(claims, runs, cells, costs, settings)
    judged = [verdict for study in studies for verdict in _own_verdicts(study, cells, costs, settings)]
    if not missing and all(run.status in (DONE, "failed", "pruned") for run in runs):
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


def _shown(
    metrics: Sequence[str], runs: Sequence[RunFolder], studies: Sequence[FoundStudy], notes: list[str]
) -> list[str]:
    """The metrics that the report is about: those that are asked for, those of the studies, or the usual ones."""
    if metrics:
        with within("--metrics"):
            return chosen_metrics(runs, metrics)
    logged = logged_metrics(runs)
    named = dict.fromkeys(tag for study in studies for tag in study.metrics)
    notes += [f"{name}: no run logged it yet" for name in named if name not in logged]
    return chosen_metrics(runs, [name for name in named if name in logged])


def _own_verdicts(
    study: FoundStudy, cells: Sequence[CellRuns], costs: Sequence[CellCosts], settings: Settings
) -> list[Judged]:
    """The claims of a study, which are about its own cells."""
    own = study.own(cells)
    of_study = [cells[index] for index in own], [costs[index] for index in own]
    return judge(study.claims, study.runs, *of_study, settings, unfinished=True)


def _mistakes(judged: Sequence[Judged]) -> list[str]:
    """What claims name that is not there and will not come any more."""
    return [f"claim {claim.text!r}: {found.reason}" for claim in judged for found in claim.findings if found.mistake]
