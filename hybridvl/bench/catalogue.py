"""Every case of an operator or a mixer by name."""

from __future__ import annotations

import difflib

from hybridvl.bench import mixer_cases, recurrence_cases, small_cases, step_cases
from hybridvl.bench.cases import Case
from hybridvl.layers.errors import ConfigError

CASES: dict[str, Case] = {
    case.name: case
    for cases in (recurrence_cases.CASES, small_cases.CASES, step_cases.CASES, mixer_cases.CASES)
    for case in cases
}
"""In the order in which the command line lists them."""


def find_case(name: str) -> Case:
    """The case of a name; ConfigError names the nearest."""
    if name not in CASES:
        near = difflib.get_close_matches(name, CASES, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"--case {name!r}: unknown{hint} (known: {', '.join(CASES)})")
    return CASES[name]
