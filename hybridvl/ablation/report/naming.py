"""What pictures call cells, and which cells they have room for."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from hybridvl.ablation.report.analysis import Analysis
from hybridvl.ablation.report.labels import short_names
from hybridvl.ablation.report.metrics import direction
from hybridvl.pictures import plain

_NAME_WIDTH = 44  # characters of a name in a picture


def cell_names(analysis: Analysis, indices: Sequence[int]) -> tuple[str, list[str]]:
    """What the names of cells are of, and the names: without the labels that all of them have, and values alone where
    only one label is left."""
    cells = [analysis.cells[index] for index in indices]
    short = short_names(dict.fromkeys(key for cell in analysis.cells for key in cell.labels))
    keys = dict.fromkeys(key for cell in cells for key in cell.labels)
    telling = [key for key in keys if len({cell.labels.get(key) for cell in cells}) > 1] or list(keys)
    if len(telling) == 1:
        names = [cell.labels.get(telling[0], "-") for cell in cells]
        return telling[0].split(".")[-1], [_wrapped(name) for name in names]
    named = [", ".join(f"{short[key]}={cell.labels[key]}" for key in telling if key in cell.labels) for cell in cells]
    return "", [_wrapped(name or cell.name) for name, cell in zip(named, cells, strict=True)]


def shared_labels(analysis: Analysis, indices: Sequence[int]) -> str:
    """ "; all with size=small": the labels that the names of cells leave out; "" where there are none."""
    cells = [analysis.cells[index] for index in indices]
    short = short_names(dict.fromkeys(key for cell in analysis.cells for key in cell.labels))
    first = cells[0].labels if len(cells) > 1 else {}
    same = {key: value for key, value in first.items() if all(cell.labels.get(key) == value for cell in cells)}
    if not same or len(same) == len(first) == max(len(cell.labels) for cell in cells):
        return ""
    return "; all with " + ", ".join(f"{short[key]}={value}" for key, value in same.items())


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
