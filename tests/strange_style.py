"""A matplotlibrc that nobody's pictures must look like, for the tests of what draws."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from matplotlib import rc_context

_STRANGE = {
    "font.family": "No Such Font",  # of which matplotlib tells for every text
    "font.size": 20,
    "axes.facecolor": "black",
    "savefig.dpi": 50,
    "text.usetex": True,  # which fails where there is no LaTeX
}


@contextmanager
def strange_style() -> Iterator[None]:
    """As if a person had asked for it."""
    with rc_context(_STRANGE):
        yield
