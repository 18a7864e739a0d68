"""The error of a mistake in a layer pattern: the string, a caret under the column, what was found and is accepted."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from hybridvl.layers.errors import ConfigError

_BEFORE, _AFTER = 60, 20  # characters shown around the column of a long pattern


class PatternError(ConfigError):
    """A mistake in a layer pattern.

    Attributes:
        problem: one sentence: what was found and what would be accepted.
        column: where, counted from 1; None where the mistake is not at one place.
    """

    def __init__(self, problem: str, text: str | None = None, at: int = 0) -> None:
        self.problem = problem
        self.column = None if text is None else at + 1
        super().__init__(problem if text is None else f"layer pattern, column {at + 1}: {problem}\n{_point(text, at)}")


def suggest(word: str, known: Iterable[str]) -> str:
    """ ", did you mean 'x'?" for the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else ""


def _point(text: str, at: int) -> str:
    """The text on one line around offset `at`, and a caret under it."""
    whole = len(text) <= _BEFORE + _AFTER
    start, stop = (0, len(text)) if whole else (max(at - _BEFORE, 0), at + _AFTER)
    shown = "".join(c if c.isprintable() else " " for c in text[start:stop])
    left, right = "..." if start else "", "..." if stop < len(text) else ""
    return f"  {left}{shown}{right}\n  {' ' * (len(left) + at - start)}^"
