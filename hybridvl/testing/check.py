"""`check_mixer`: every promise of the mixer contract, in two dtypes, with one readable error."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from hybridvl.layers.base import MixerConfig
from hybridvl.layers.errors import ConfigError
from hybridvl.testing.costs import COSTS
from hybridvl.testing.equivalence import EQUIVALENCE
from hybridvl.testing.states import STATES
from hybridvl.testing.subject import Comparison, Subject

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
"""Largest accepted |difference| / max |expected|, by dtype."""

MIXER_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a faulty mixer may well raise, and what then counts as a failure of the property under check."""

PROPERTIES = EQUIVALENCE | STATES | COSTS
"""Name of each property -> the comparisons that show it."""


class MixerCheckError(AssertionError):
    """A mixer breaks its contract. `failures`: property -> (worst error, what was compared)."""

    def __init__(self, name: str, failures: dict[str, tuple[float, str]]) -> None:
        self.failures = failures
        lines = [f"{prop}: worst error {error:.3g} ({what})" for prop, (error, what) in failures.items()]
        count = f"{len(failures)} {'property' if len(failures) == 1 else 'properties'}"
        super().__init__("\n  ".join([f"mixer {name} breaks {count} of the contract:", *lines]))


def check_mixer(
    config: MixerConfig,
    width: int = 64,
    *,
    batch: int = 2,
    tokens: int = 70,
    seed: int = 0,
    skip: Collection[str] = (),
) -> dict[str, float]:
    """Check every promise that a mixer makes, `PROPERTIES`, on random weights and inputs.

    Numbers are compared in float64 (relative to max: 1e-10) and float32 (2e-5), on the CPU. Give `config` the sizes of
    a toy (a few heads, a window below `tokens`): the suite runs token by token, too.

    width: model width D. batch: rows B, at least 2. tokens: T, at least 16. skip: names of properties to leave out
    ("flops" for a backend other than the PyTorch one). Returns the worst error of each property.
    Raises MixerCheckError naming every broken property, with its worst error (infinite where the mixer raised);
    ConfigError for a bad argument, or from `config.build`.
    """
    unknown = sorted(set(skip) - PROPERTIES.keys())
    if unknown:
        raise ConfigError(f"skip = {unknown}: expected some of {', '.join(PROPERTIES)}")
    if batch < 2 or tokens < 16:
        raise ConfigError(f"batch = {batch}, tokens = {tokens}: expected at least 2 and 16")
    worst: dict[str, float] = {}
    failures: dict[str, tuple[float, str]] = {}
    for dtype, tolerance in TOLERANCE.items():
        for name in (name for name in PROPERTIES if name not in skip):
            # A fresh subject each time: a property's numbers do not depend on which others are checked.
            subject = Subject(config, width, batch, tokens, seed, dtype)
            for what, error in _errors(PROPERTIES[name](subject)):
                worst[name] = max(worst.get(name, 0.0), error)
                if error > max(tolerance, failures.get(name, (0.0, ""))[0]):
                    failures[name] = error, f"{what}, {str(dtype).removeprefix('torch.')}, accepted {tolerance:g}"
    if failures:
        raise MixerCheckError(config.name or type(config).__name__, failures)
    return worst


def relative_error(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max |expected|; infinite for other shapes or anything that is not finite."""
    if found.shape != expected.shape or not bool(torch.isfinite(found).all() and torch.isfinite(expected).all()):
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    difference = (found.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    return difference / scale if scale > 0 else difference


def _errors(comparisons: Iterator[Comparison]) -> Iterator[tuple[str, float]]:
    """What was compared and its error; infinite, and the last, when the mixer raises."""
    try:
        for what, found, expected in comparisons:
            yield what, relative_error(found, expected)
    except MIXER_ERRORS as error:
        yield f"raised {type(error).__name__}: {error}", float("inf")
