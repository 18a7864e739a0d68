"""All pictures of a report, as PNG files."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from hybridvl.ablation.report.analysis import Analysis
from hybridvl.ablation.report.cell_pictures import draw_cells, draw_differences
from hybridvl.ablation.report.cost_pictures import draw_growth, draw_pareto
from hybridvl.ablation.report.curve_pictures import draw_curves, draw_slices
from hybridvl.pictures import default_style, png

_DRAWINGS: Sequence[tuple[str, str, Callable[[Analysis, str], Figure | None]]] = (
    ("cells", "{metric} of every cell with intervals and single seeds", draw_cells),
    ("differences", "paired differences of {metric} to the baseline", draw_differences),
    ("slices", "{metric} by slice", draw_slices),
    ("curves", "learning curves with bands", draw_curves),
    ("pareto", "{metric} against parameters, FLOPs, state bytes and decode latency", draw_pareto),
)


@dataclass(frozen=True)
class Picture:
    """One PNG file.

    Attributes:
        name: of the file.
        metric: that it is about; "" for costs alone.
        shows: what it shows.
        data: of the file.
    """

    name: str
    metric: str
    shows: str
    data: bytes


@default_style()
def draw_all(analysis: Analysis) -> list[Picture]:
    """Every picture that there is something to show in, in the order of the report."""
    found = []
    for metric in analysis.metrics:
        start = re.sub(r"[^A-Za-z0-9._-]+", "-", metric)
        for name, shows, draw in _DRAWINGS:
            if (made := draw(analysis, metric)) is not None:
                found.append(Picture(f"{start}-{name}.png", metric, shows.format(metric=metric), png(made)))
    if analysis.metrics and (made := draw_growth(analysis, analysis.metrics[0])) is not None:
        found.append(Picture("growth.png", "", "state and decode latency against the number of tokens", png(made)))
    return found
