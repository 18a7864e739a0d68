"""What pictures call cells and metrics, and which cells they have room for."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from hybridvl.ablation.report.analysis import Analysis
from hybridvl.ablation.report.metrics import is_cost
from hybridvl.ablation.report.style import plain

_NAME_WIDTH = 44  # characters of a name in a picture


def cell_names(analysis: Analysis, indices: Sequence[int]) -> tuple[str, list[str]]:
    """What the names of cells are of, and the names: values alone where there is only one label."""
    keys = {key for index in indices for key in analysis.cells[index].labels}
    if len(keys) == 1:
        (key,) = keys
        names = [analysis.cells[index].labels.get(key, "-") for index in indices]
        return key.split(".")[-1], [_wrapped(name) for name in names]
    return "", [_wrapped(analysis.cells[index].name) for index in indices]


def _wrapped(name: str) -> str:
    """A name on lines that are short enough."""
    return plain("\n".join(textwrap.wrap(name, _NAME_WIDTH)) or name)


def shown_cells(analysis: Analysis, metric: str, most: int) -> tuple[list[int], str]:
    """The cells that have a metric, in order; of more than `most` the best, and then a note that says so."""
    results = analysis.results[metric]
    found = [index for index, result in enumerate(results) if result.values]
    if len(found) <= most:
        return found, ""
    sign = 1 if is_cost(metric) else -1
    best = sorted(found, key=lambda index: sign * results[index].interval.mean)[:most]
    return sorted(best), f"the {most} best of {len(found):,} cells"


def metric_label(metric: str) -> str:
    """A metric with its unit, as far as its name tells."""
    if is_share(metric):
        return f"{metric} (share, 0 to 1)"
    units = {"seconds": "s", "step_s": "s", "bytes": "B", "tokens_per_s": "tokens/s", "loss": "nats", "entropy": "nats"}
    unit = next((unit for word, unit in units.items() if metric.endswith(word)), "")
    return f"{metric} ({unit})" if unit else metric


def is_share(metric: str) -> bool:
    """Whether a metric is a share of right answers."""
    return metric.endswith(("exact", "accuracy"))
