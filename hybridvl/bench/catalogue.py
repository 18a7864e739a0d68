"""Every case of an operator or a mixer by name."""

from __future__ import annotations

import dataclasses
import difflib

import torch

from hybridvl.bench import mixer_cases, recurrence_cases, small_cases, step_cases
from hybridvl.bench.cases import Case, Request
from hybridvl.bench.sides import Work
from hybridvl.layers.errors import ConfigError

CASES: dict[str, Case] = {
    case.name: case
    for cases in (recurrence_cases.CASES, small_cases.CASES, step_cases.CASES, mixer_cases.CASES)
    for case in cases
}
"""In the order in which the command line lists them."""


def build(case: Case, request: Request, errors: bool = False) -> Work:
    """The work of a case; with `errors` it has a float64 reference, of the same inputs, to hold all sides against.

    Raises ConfigError for a case that has none.
    """
    work = case.build(request)
    if not errors:
        return work
    if not case.has_reference:
        known = ", ".join(name for name, other in CASES.items() if other.has_reference)
        raise ConfigError(f"--errors: {case.name} has no float64 reference; expected one of {known}")
    exact = dataclasses.replace(request, dtype=torch.float64, rounded=request.dtype, backend="reference", peers=())
    return dataclasses.replace(work, reference=case.build(exact).sides[0].run)


def find_case(name: str) -> Case:
    """The case of a name; ConfigError names the nearest."""
    if name not in CASES:
        near = difflib.get_close_matches(name, CASES, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"--case {name!r}: unknown{hint} (known: {', '.join(CASES)})")
    return CASES[name]
