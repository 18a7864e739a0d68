"""What pictures call cells, and which cells they have room for."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from hybridvl.ablation.report.analysis import Analysis
from hybridvl.ablation.report.metrics import direction
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
    better = direction(metric)
    best = sorted(found, key=lambda index: -better * results[index].interval.mean)[:most]
    return sorted(best), f"the {most} {'best' if better else 'first'} of {len(found):,} cells"
