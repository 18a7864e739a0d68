"""Settings that are tuned for every cell by itself: the best by validation, so that each is compared at its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from hybridvl.ablation.report.cells import CellRuns, label_key
from hybridvl.ablation.report.labels import MISSING, short_names
from hybridvl.ablation.report.metrics import chosen_metrics, is_cost
from hybridvl.ablation.report.runs import RunFolder
from hybridvl.layers.errors import ConfigError


def tuned(
    cells: Sequence[CellRuns], runs: Sequence[RunFolder], tune: Mapping[str, str]
) -> tuple[list[CellRuns], list[str]]:
    """Cells without the labels that are tuned, and a note about what was chosen for each.

    Of cells that differ in such a label alone the one with the best mean of the metric stands for all of them; the runs
    of the others are among those that are passed over.

    Args:
        cells: all of them.
        runs: all of them.
        tune: by label the metric that decides, of the validation, as the test's would flatter what was tuned most.

    Raises:
        ConfigError: a label that no cell has, a metric that no run logged.
    """
    notes: list[str] = []
    found = list(cells)
    for label, metric in tune.items():
        key = label_key("tune", found, label)
        chosen_metrics(runs, [metric])
        if metric.startswith("test/"):
            raise ConfigError(
                f"tune: {label}: {metric!r}; expected a metric of the validation, such as val/loss: what is "
                "chosen by the test cannot be tested by it"
            )
        groups: dict[frozenset[tuple[str, str]], list[CellRuns]] = {}
        for cell in found:  # those of another study, which has no such label, stay as they are
            rest = frozenset((name, value) for name, value in cell.labels.items() if name != key)
            groups.setdefault(rest, []).append(cell)
        short = short_names(dict.fromkeys(name for cell in found for name in cell.labels))
        found = [
            _best(group, key, metric, short, notes) if any(key in cell.labels for cell in group) else group[0]
            for group in groups.values()
        ]
    return found, notes


def _best(
    candidates: Sequence[CellRuns], key: str, metric: str, short: Mapping[str, str], notes: list[str]
) -> CellRuns:
    """The candidate with the best mean among those with the most seeds, in the name of all; the first where none has
    the metric.

    One whose other seeds have failed would win by what survived.
    """
    sign = -1 if is_cost(metric) else 1
    means = [fmean(values) if (values := cell.values(metric).values()) else math.nan for cell in candidates]
    known = [index for index, mean in enumerate(means) if not math.isnan(mean)]
    seeds = [len(cell.values(metric)) for cell in candidates]
    best = max(known, key=lambda index: (seeds[index], sign * means[index]), default=0)
    said = [f"{short[key]}={cell.labels.get(key, MISSING)}" for cell in candidates]
    labels = {name: value for name, value in candidates[best].labels.items() if name != key}
    name = ", ".join(f"{short[other]}={value}" for other, value in labels.items()) or "all runs"
    passed_over = [entry for cell in candidates for entry in cell.passed_over]
    for index, cell in enumerate(candidates):
        if index != best:
            why = f"done, but {name} is best with {said[best]} by {metric}: {means[best]:.4g}, not {means[index]:.4g}"
            why += f", of {seeds[index]} seeds alone" if seeds[index] < seeds[best] else ""
            passed_over += [(run, why) for run in cell.used.values()]
    if known:
        others = "".join(f"; {means[index]:.4g} with {said[index]}" for index in known if index != best)
        notes.append(f"{name}: with {said[best]}, the best by {metric} ({means[best]:.4g}{others})")
    runs = tuple(run for cell in candidates for run in cell.runs)
    return CellRuns(labels, name, runs, candidates[best].used, tuple(passed_over))
