"""The metrics that runs have logged: which there are, which a report is about, their units, and which way is better."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Sequence

from hybridvl.ablation.report.labels import natural
from hybridvl.ablation.report.runs import DONE, RunFolder
from hybridvl.layers.errors import ConfigError

_LESS = {"loss", "divergence", "entropy", "perplexity", "error", "errors", "latency", "bytes", "mib", "skipped"}
_NEITHER = {"norm", "lr"}
_UNITS = {
    **{"s": "s", "seconds": "s", "ms": "ms", "latency": "s", "bytes": "B", "mib": "MiB"},
    **{"loss": "nats", "entropy": "nats", "divergence": "nats"},
}


def logged_metrics(runs: Sequence[RunFolder]) -> list[str]:
    """Every metric of any run: test first, then validation, training and the rest, each by name."""
    first = {"test": 0, "val": 1, "train": 2}
    names = {name for run in runs for name in run.metrics}
    return sorted(names, key=lambda name: (first.get(name.split("/")[0], 3), natural(name)))


def chosen_metrics(runs: Sequence[RunFolder], wanted: Sequence[str]) -> list[str]:
    """The metrics to look at; those that are named, or the exact share of the test, or what there is in its place.

    Raises:
        ConfigError: a metric that no run logged.
    """
    logged = logged_metrics(runs)
    for name in wanted:
        if name not in logged:
            near = difflib.get_close_matches(name, logged, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"{name!r}: no run logged it; {hint}there are {', '.join(logged) or 'none'}")
    if wanted:
        return list(dict.fromkeys(wanted))
    counts = Counter(name for run in runs if run.status == DONE for name in run.metrics)
    usual = ("test/exact", "val/exact", "test/token_accuracy", "val/token_accuracy", "val/loss", "train/loss")
    found = [name for name in usual if counts[name]]
    # Runs that were not tested have no test metric: what most of them have says most.
    return [max(found, key=lambda name: counts[name])] if found else logged[:1]


def is_share(metric: str) -> bool:
    """Whether a metric is a share of right answers."""
    return _words(metric)[-1] in ("exact", "accuracy")


def direction(metric: str) -> int:
    """1 where more of a metric is better, -1 where less is, 0 where neither is, as of norms.

    Whole words of its name decide: val/glossary_exact is no loss.
    """
    words = _words(metric)
    if is_share(metric) or _is_rate(words):
        return 1
    if not _NEITHER.isdisjoint(words):
        return 0
    return -1 if not _LESS.isdisjoint(words) or _unit(words) == "s" or words[1:2] == ["layer"] else 1


def is_cost(metric: str) -> bool:
    """Whether less of a metric is better."""
    return direction(metric) < 0


def metric_label(metric: str) -> str:
    """A metric with its unit, as far as its name tells."""
    if is_share(metric):
        return f"{metric} (share, 0 to 1)"
    unit = _unit(_words(metric))
    return f"{metric} ({unit})" if unit else metric


def _words(metric: str) -> list[str]:
    return re.split(r"[/_]", metric)


def _is_rate(words: Sequence[str]) -> bool:
    """tokens_per_s, which ends in a unit of time and is none."""
    return "per" in words[:-1]


def _unit(words: Sequence[str]) -> str:
    if _is_rate(words):
        place = len(words) - 1 - words[::-1].index("per")
        return f"{words[place - 1]}/{words[place + 1]}"
    return _UNITS.get(words[-1], "")
