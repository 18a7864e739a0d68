"""What all pictures of the project share: a sheet, its ink, and a look that is alike on every machine."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import matplotlib.style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK, FAINT, GRID = "#22252b", "#6b7280", "#e5e7eb"


@contextmanager
def default_style() -> Iterator[None]:
    """While a figure is drawn and saved, matplotlib as it comes: in a `with`, or around a function as its decorator.

    A person's matplotlibrc may ask for fonts that are not there, or for LaTeX, both when a figure is made and when it
    is saved.
    """
    with matplotlib.style.context("default"):
        yield


def figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """An empty figure of a size in inches; layout: what finds the places of its axes, None where they are given."""
    made = Figure(figsize=(width, height), dpi=150, facecolor="white", layout=layout)
    FigureCanvasAgg(made)
    return made


def png(made: Figure) -> bytes:
    """A figure as a PNG file."""
    data = io.BytesIO()
    made.savefig(data, format="png")
    return data.getvalue()


def plain(text: str) -> str:
    """A text that matplotlib takes as it is: a dollar sign would start a formula."""
    return text.replace("$", r"\$")
