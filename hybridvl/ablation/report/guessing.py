"""How far guessing gets in the probe that runs were tested on, and how many questions it asks."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from hybridvl.ablation.report.cells import CellRuns
from hybridvl.data.probes.probe import Probe

SAME = 0.01
"""Shares that differ by less are one line in a picture."""
_PROBES = "hybridvl.data.probes."


def guessing(cells: Sequence[CellRuns], metrics: Sequence[str]) -> dict[str, float]:
    """The expected share of exact answers of one who has not seen the samples, for those of the metrics that are such
    shares of a probe; only where it is the same in all cells."""
    wanted = {metric: _split_and_kind(metric) for metric in metrics}
    found: dict[str, float] = {}
    tasks = [_task(cell) for cell in cells]
    by_cell = [{split: {} if task is None else _chances(*task, split) for split in ("val", "test")} for task in tasks]
    for metric, (split, kind) in wanted.items():
        values = [chances.get(split, {}).get(kind) for chances in by_cell]
        known = [value for value in values if value is not None]
        if known and len(known) == len(values) and max(known) - min(known) < SAME:
            found[metric] = sum(known) / len(known)
    return found


def questions(cell: CellRuns, metric: str) -> int | None:
    """How many questions of a probe one run's share of exact answers is of; None where that is not known."""
    split, kind = _split_and_kind(metric)
    limit = cell.section("trainer").get(f"limit_{split}_batches")
    if limit not in (None, 1.0) or split not in ("val", "test"):
        return None
    task = _task(cell)
    return None if task is None else _counts(*task, split).get(kind)


def _split_and_kind(metric: str) -> tuple[str, str]:
    """ "test/lag_1_exact" -> ("test", "lag_1"), "test/exact" -> ("test", ""); a kind that no probe has for others."""
    split, _, name = metric.partition("/")
    kind = name.removesuffix("exact")
    return split, "/" if kind == name else kind.removesuffix("_")


def _task(cell: CellRuns) -> tuple[str, str] | None:
    """The probe of a cell's runs: its class, and its arguments as JSON."""
    task = cell.section("data", "task")
    if not str(task.get("class_path")).startswith(_PROBES):
        return None
    return str(task["class_path"]), json.dumps(task.get("init_args") or {}, sort_keys=True)


@lru_cache(maxsize=256)
def _chances(class_path: str, arguments: str, split: str) -> Mapping[str, float]:
    task = _probe(class_path, arguments)
    return {} if task is None else task.chances("val" if split == "val" else "test")


@lru_cache(maxsize=256)
def _counts(class_path: str, arguments: str, split: str) -> Mapping[str, int]:
    task = _probe(class_path, arguments)
    asked = [] if task is None else task.questions("val" if split == "val" else "test")
    return {**Counter(question.kind for question in asked), "": len(asked)} if asked else {}


def _probe(class_path: str, arguments: str) -> Probe[Any] | None:
    module, _, name = class_path.rpartition(".")
    try:
        task = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    except (ImportError, AttributeError, TypeError, ValueError):  # a probe as it was in another version
        return None
    return task if isinstance(task, Probe) else None
