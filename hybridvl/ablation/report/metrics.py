"""The metrics that runs have logged: which there are, which a report is about, and whether less of them is better."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence

from hybridvl.ablation.report.labels import natural
from hybridvl.ablation.report.runs import DONE, Run
from hybridvl.layers.errors import ConfigError


def logged_metrics(runs: Sequence[Run]) -> list[str]:
    """Every metric of any run: test first, then validation, training and the rest, each by name."""
    first = {"test": 0, "val": 1, "train": 2}
    names = {name for run in runs for name in run.metrics}
    return sorted(names, key=lambda name: (first.get(name.split("/")[0], 3), natural(name)))


def chosen_metrics(runs: Sequence[Run], wanted: Sequence[str]) -> list[str]:
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


def is_cost(metric: str) -> bool:
    """Whether less of a metric is better."""
    name = metric.split("/")[-1]
    words = {"loss", "divergence", "entropy", "perplexity", "error", "seconds", "latency", "bytes", "mib"}
    return not words.isdisjoint(name.split("_")) or name == "step_s" or name.startswith("layer_")
