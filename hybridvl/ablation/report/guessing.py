"""How far guessing gets in the probe that runs were tested on."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache

from hybridvl.ablation.report.cells import Cell
from hybridvl.data.probes.probe import Probe

_PROBES = "hybridvl.data.probes."
_SAME = 0.01  # shares that differ by less are one line in a picture


def guessing(cells: Sequence[Cell], metrics: Sequence[str]) -> dict[str, float]:
    """The expected share of exact answers of one who has not seen the samples, for those of the metrics that are such
    shares of a probe; only where it is the same in all cells."""
    wanted = {metric: _split_and_kind(metric) for metric in metrics}
    found: dict[str, float] = {}
    by_cell = [{split: _chances(cell, split) for split in ("val", "test")} for cell in cells]
    for metric, (split, kind) in wanted.items():
        values = [chances.get(split, {}).get(kind) for chances in by_cell]
        known = [value for value in values if value is not None]
        if known and len(known) == len(values) and max(known) - min(known) < _SAME:
            found[metric] = sum(known) / len(known)
    return found


def _split_and_kind(metric: str) -> tuple[str, str]:
    """ "test/lag_1_exact" -> ("test", "lag_1"), "test/exact" -> ("test", ""); a kind that no probe has for others."""
    split, _, name = metric.partition("/")
    kind = name.removesuffix("exact")
    return split, "/" if kind == name else kind.removesuffix("_")


def _chances(cell: Cell, split: str) -> Mapping[str, float]:
    run = next(iter(cell.used.values()), None)
    data = None if run is None else run.config.get("data")
    task = data.get("task") if isinstance(data, Mapping) else None
    if not isinstance(task, Mapping) or not str(task.get("class_path")).startswith(_PROBES):
        return {}
    return _of_task(str(task["class_path"]), json.dumps(task.get("init_args") or {}, sort_keys=True), split)


@lru_cache(maxsize=256)
def _of_task(class_path: str, arguments: str, split: str) -> Mapping[str, float]:
    module, _, name = class_path.rpartition(".")
    try:
        task = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    except (ImportError, AttributeError, TypeError, ValueError):  # a probe as it was in another version
        return {}
    return task.chances("val" if split == "val" else "test") if isinstance(task, Probe) else {}
