"""Scores of written replies: exact match and digit accuracy, overall and by kind of question."""

from __future__ import annotations

from collections import Counter

from hybridvl.training.processes.sums import summed_counts

COUNTING = frozenset({"count"})
"""Kinds whose digits are the result of counting, not digits that stand on the page."""


class ReplyScores:
    """Counts over many replies; `metrics` gives the rates.

    exact: share of replies equal to the target, white space at the ends aside.
    <kind>_exact: the same for one kind of question, for example line_exact.
    digit_accuracy: share of the targets' digits that the reply has at the same place (the first digit of the reply
        against the first of the target, and so on; a missing digit is wrong), over answers that are read off the
        page; <kind>_digit_accuracy for one kind.
    """

    def __init__(self) -> None:
        self._right: Counter[str] = Counter()
        self._total: Counter[str] = Counter()

    def add(self, kind: str, reply: str, target: str) -> bool:
        """Count one reply; returns whether it is exactly right."""
        exact = reply.strip() == target.strip()
        self._count("exact", int(exact), 1)
        if kind:
            self._count(f"{kind}_exact", int(exact), 1)
        right, total = digits_right(reply, target)
        if total:
            if kind not in COUNTING:
                self._count("digit_accuracy", right, total)
            if kind:
                self._count(f"{kind}_digit_accuracy", right, total)
        return exact

    def over_all_processes(self) -> ReplyScores:
        """The counts of all processes together; all of them must call this."""
        together = ReplyScores()
        together._right.update(summed_counts(self._right))
        together._total.update(summed_counts(self._total))
        return together

    def metrics(self) -> dict[str, float]:
        """Every rate by name."""
        return {name: self._right[name] / total for name, total in self._total.items()}

    def _count(self, name: str, right: int, total: int) -> None:
        self._right[name] += right
        self._total[name] += total


def digits_right(reply: str, target: str) -> tuple[int, int]:
    """How many digits of the target the reply has at the same place, and how many the target has."""
    written = [c for c in reply if c.isdigit()]
    wanted = [c for c in target if c.isdigit()]
    return sum(a == b for a, b in zip(written, wanted, strict=False)), len(wanted)
