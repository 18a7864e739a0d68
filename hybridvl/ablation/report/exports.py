"""The report for programs: one row a run, one row a cell and metric, and everything as JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from hybridvl.ablation.report.analysis import Analysis
from hybridvl.ablation.report.cells import Result
from hybridvl.ablation.report.runs import RunFolder
from hybridvl.ablation.report.wording import without_nan
from hybridvl.ablation.statistics import mean_interval

_COSTS = ("parameters", "flops", "decode_flops", "state_bytes", "context", "decode_seconds")
_FACTS = ("pattern", "parameters", "trainable_parameters", "steps", "tokens", "samples", "seconds")


def runs_csv(analysis: Analysis) -> str:
    """One row a run: where, its cell, labels and seed, how it ended, what it cost, and every metric."""
    labels = _label_keys(analysis)
    head = ["run", "cell", *(f"label {key}" for key in labels), "seed", "status", "reason", "counts", *_FACTS]
    rows = []
    for cell in analysis.cells:
        used = {id(run) for run in cell.used.values()}
        for run in cell.runs:
            facts = [run.facts.get(key, "") for key in _FACTS]
            own = [cell.labels.get(key, "") for key in labels]
            seed = "" if run.seed is None else run.seed
            ends = [seed, run.status, run.reason, "yes" if id(run) in used else "no"]
            metrics = [run.metrics.get(name, "") for name in analysis.logged]
            rows.append([str(run.path), cell.name, *own, *ends, *facts, *metrics])
    return _csv([*head, *analysis.logged], rows)


def cells_csv(analysis: Analysis) -> str:
    """One row a cell and metric: seeds, mean and interval, difference to the baseline with its test, costs."""
    labels = _label_keys(analysis)
    head = ["cell", *(f"label {key}" for key in labels), "metric", "runs", *_result_row(None)]
    rows = []
    for name in analysis.logged:
        for cell, result, cost in zip(analysis.cells, analysis.results[name], analysis.costs, strict=True):
            if result.values:
                own = [cell.labels.get(key, "") for key in labels]
                spent = [_plain(getattr(cost, key)) for key in _COSTS]
                rows.append([cell.name, *own, name, len(cell.runs), *_result_row(result).values(), *spent])
    return _csv([*head, *_COSTS], rows)


def to_json(analysis: Analysis, figures: Sequence[str] = ()) -> str:
    """Everything. NaN, where too few runs say nothing, is null."""
    cells = []
    for index, cell in enumerate(analysis.cells):
        results = {name: _result(analysis.results[name][index]) for name in analysis.logged}
        baseline = analysis.baselines[index]
        cells.append(
            {
                "name": cell.name,
                "labels": dict(cell.labels),
                "runs": [str(run.path) for run in cell.runs],
                "baseline": None if baseline is None else analysis.cells[baseline].name,
                "costs": asdict(analysis.costs[index]),
                "metrics": {name: result for name, result in results.items() if result["values"]},
            }
        )
    content = {
        "statuses": analysis.statuses,
        "settings": asdict(analysis.settings),
        "metrics": list(analysis.metrics),
        "claims": [{**asdict(claim), "verdict": claim.verdict} for claim in analysis.claims],
        "cells": cells,
        "runs": [_run(run) for run in analysis.runs],
        "left_out": [{"run": str(run.path), "reason": reason} for run, reason in analysis.left_out],
        "notes": list(analysis.notes),
        "warnings": list(analysis.warnings),
        "figures": list(figures),
    }
    return _json_lines(without_nan(content))


def _json_lines(content: Mapping[str, Any]) -> str:
    """JSON with a line for each key, and for each entry of a list: to be read, and written fast."""
    parts = []
    for key, value in content.items():
        text = json.dumps(value, ensure_ascii=False)
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in value) + "\n]"
        parts.append(f"{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _run(run: RunFolder) -> dict[str, Any]:
    return {
        "folder": str(run.path),
        "status": run.status,
        "reason": run.reason,
        "seed": run.seed,
        "facts": dict(run.facts),
        "metrics": dict(run.metrics),
    }


def _result(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = {
        "values": {str(seed): value for seed, value in result.values.items()},
        **asdict(result.interval),
    }
    if result.difference is not None:
        found["difference"] = {
            **asdict(result.difference.interval),
            "by_seed": dict(zip(map(str, result.difference.pairs), result.difference.differences, strict=True)),
            "p": result.difference.p,
            "p_holm": result.p_corrected,
        }
    return found


def _result_row(result: Result | None) -> dict[str, Any]:
    nothing = mean_interval([])
    interval = nothing if result is None else result.interval
    difference = None if result is None else result.difference
    apart = nothing if difference is None else difference.interval
    row = {
        "seeds": interval.count,
        **{name: getattr(interval, name) for name in ("mean", "low", "high", "deviation")},
        "pairs": apart.count,
        "difference": apart.mean,
        "difference_low": apart.low,
        "difference_high": apart.high,
        "p": math.nan if difference is None else difference.p,
        "p_holm": math.nan if result is None else result.p_corrected,
    }
    return {key: _plain(value) for key, value in row.items()}


def _label_keys(analysis: Analysis) -> list[str]:
    return list(dict.fromkeys(key for cell in analysis.cells for key in cell.labels))


def _csv(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue()


def _plain(value: Any) -> Any:
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else value
