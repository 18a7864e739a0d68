"""Run folders as fits leave them, written without any training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

NET = {
    "pattern": "gdn*2 swa",
    "width": 32,
    "mlp_width": 64,
    "vocab_size": 128,
    "mixers": {"swa": {"heads": 2, "kv_heads": 2, "head_dim": 16, "window": 16}, "gdn": {"heads": 2, "head_dim": 16}},
}
Scalars = Mapping[str, Sequence[tuple[int, float]]]


def recipe(seed: int, labels: Mapping[str, str] | None = None, pattern: str = "gdn*2 swa") -> dict[str, Any]:
    """A resolved recipe, as far as reports look at it."""
    return {
        "seed_everything": seed,
        "model": {"net": {**NET, "pattern": pattern}, "optimizer": {"lr": 0.003}},
        "data": {"seed": seed, "max_tokens": 128},
        "run": {"name": "cell", "root": "runs", "stage": "supervised", "test": True, "labels": dict(labels or {})},
    }


def write_events(folder: Path, scalars: Scalars, number: int = 0) -> Path:
    """An event file of scalars."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"events.out.tfevents.{1_700_000_000 + number}.here.1.0"
    with path.open("wb") as file:
        writer = RecordWriter(file)
        writer.write(Event(file_version="brain.Event:2").SerializeToString())
        for tag, points in scalars.items():
            for step, value in points:
                summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
                writer.write(Event(step=step, summary=summary).SerializeToString())
        writer.flush()
    return path


def write_run(
    folder: Path,
    config: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
    scalars: Scalars | None = None,
    ended: bool = True,
) -> Path:
    """A run folder; without metrics one of a fit that did not come to its end."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(config)))
    if scalars is not None:
        write_events(folder, scalars)
    if metrics is not None:
        facts = {"metrics": dict(metrics), "pattern": "gdn*2 swa", "parameters": 1234, "steps": 100}
        facts |= {"ended": "2026-01-01T00:00:00+00:00"} if ended else {}
        (folder / "metrics.json").write_text(json.dumps(facts))
    return folder


def write_study(root: Path, values: Mapping[str, Sequence[float]], metric: str = "test/exact") -> Path:
    """A study of one axis `ratio`: the metric of each seed by label, its learning curve rising to it."""
    for label, results in values.items():
        for seed, value in enumerate(results):
            folder = root / f"ratio={label.replace('/', '-')}" / f"seed_{seed}"
            curve = [(step, value * step / 100) for step in range(10, 101, 10)]
            metrics = {metric: value, "val/exact": value}
            write_run(folder, recipe(seed, {"ratio": label}), metrics, {"val/exact": curve})
            record = {"key": "k", "labels": {"ratio": label}, "seed": seed, "arguments": []}
            (folder.parent / f"seed_{seed}.json").write_text(json.dumps(record))
            done = {"status": 0, "signal": None, "reason": "", "ended": "2026-01-01T00:00:00+00:00"}
            (folder.parent / f"seed_{seed}.ended.json").write_text(json.dumps(done))
    axes = {"ratio": {"key": "model.net.pattern", "values": dict.fromkeys(values, "gdn*2 swa")}}
    study = {"name": root.name, "axes": axes, "baseline": {"ratio": next(iter(values))}, "metrics": [metric]}
    (root / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return root
