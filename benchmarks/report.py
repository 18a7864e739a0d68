"""How long `hybridvl report` takes for a study of many runs, and for the next one after a run was added.

    python benchmarks/report.py [--runs 1000] [--seeds 3] [--folder DIR]

The runs are written, not trained: resolved recipes, metrics with slices, and event files as a fit of 560 steps leaves
them, with 10 scalars every 10 steps and 12 more in its validations.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

RECIPES = Path(__file__).parents[1] / "recipes" / "tiny"
PATTERNS = ("gdn*3", "gdn*2 swa", "gdn swa*2", "swa*3", "gdn*2 full", "full*3")
STEPS = 560
LAGS = ("1", "2", "3_4", "5_8", "9_16", "17_32")
_FILES = 8  # different event files; writing one takes longer than reading it


def write_study(folder: Path, runs: int, seeds: int) -> None:
    """A study of `runs` runs, `seeds` of each cell."""
    parts = [OmegaConf.load(RECIPES / name) for name in ("streams.yaml", "frames.yaml")]
    recipe: Any = OmegaConf.to_container(OmegaConf.merge(*parts, {"seed_everything": 0}), resolve=True)
    # A resolved recipe has every default of the trainer, too.
    recipe["trainer"] |= {f"setting_{number}": None for number in range(40)}
    events = [_events(random.Random(number)) for number in range(_FILES)]
    for number in range(runs):
        write_run(folder, recipe, events[number % _FILES], *divmod(number, seeds))
    study = {"name": folder.name, "baseline": {"pattern": PATTERNS[0], "lr": _rate(0)}, "metrics": ["test/exact"]}
    (folder / "study.yaml").write_text(yaml.safe_dump(study))


def write_run(folder: Path, recipe: dict[str, Any], events: bytes, cell: int, seed: int) -> None:
    """One run of a cell."""
    rng = random.Random(1000 * cell + seed)
    labels = {"pattern": PATTERNS[cell % len(PATTERNS)], "lr": _rate(cell // len(PATTERNS))}
    run = folder / f"cell_{cell}" / f"seed_{seed}"
    run.mkdir(parents=True)
    net = {**recipe["model"]["net"], "pattern": labels["pattern"]}
    own = {
        **recipe,
        "seed_everything": seed,
        "model": {**recipe["model"], "net": net},
        "run": {"name": f"cell_{cell}", "stage": "supervised", "test": True, "labels": labels},
    }
    (run / "config.yaml").write_text(yaml.dump(own, Dumper=yaml.CSafeDumper))
    (run / "events.out.tfevents.1700000000.here.1.0").write_bytes(events)
    metrics = {f"test/lag_{lag}_exact": rng.random() for lag in LAGS}
    metrics |= {f"val/lag_{lag}_exact": rng.random() for lag in LAGS}
    metrics |= {"test/exact": rng.random(), "val/exact": rng.random(), "val/loss": rng.random()}
    facts = {"metrics": metrics, "parameters": 100_000 + cell, "steps": STEPS, "tokens": 1, "seconds": 1.5}
    (run / "metrics.json").write_text(json.dumps({**facts, "ended": "2026-01-01T00:00:00+00:00"}))
    start = {"key": "k", "labels": labels, "seed": seed, "arguments": []}
    run.with_name(f"seed_{seed}.json").write_text(json.dumps(start))
    ended = {"status": 0, "signal": None, "reason": "", "ended": "2026-01-01T00:00:00+00:00"}
    run.with_name(f"seed_{seed}.ended.json").write_text(json.dumps(ended))


def timed_report(folder: Path) -> tuple[float, float, str]:
    """Seconds of one report, the start of Python included, on the clock and of one core; what it says to have read."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "hybridvl", "report", str(folder)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    read = next(line for line in done.stdout.splitlines() if line.startswith("read"))
    seconds, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return seconds, busy, read.removeprefix("read").strip()


def main(argv: Sequence[str]) -> int:
    """Write a study, report it, add a run, report again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", help="for the study; default: a temporary one")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary) / "study"
        write_study(folder, options.runs, options.seeds)
        rows = [("first report", *timed_report(folder))]
        rows.append(("again", *timed_report(folder)))
        cell, seed = divmod(options.runs, options.seeds)
        config = yaml.load((folder / "cell_0" / "seed_0" / "config.yaml").read_text(), yaml.CSafeLoader)
        write_run(folder, config, _events(random.Random(99)), cell, seed)
        rows.append(("a run added", *timed_report(folder)))
    print(f"{options.runs:,} runs")
    for name, seconds, busy, read in rows:
        print(f"{name:14}{seconds:6.1f} s, {busy:5.1f} s of one core   {read}")
    return 0


def _rate(number: int) -> str:
    return f"{0.0001 * (number + 1):.4f}"


def _events(rng: random.Random) -> bytes:
    """An event file of a fit."""
    with tempfile.TemporaryFile() as file:
        writer = RecordWriter(file)
        writer.write(Event(file_version="brain.Event:2").SerializeToString())

        def write(step: int, tags: Sequence[str]) -> None:
            for tag in tags:
                summary = Summary(value=[Summary.Value(tag=tag, simple_value=rng.random())])
                writer.write(Event(wall_time=1.0, step=step, summary=summary).SerializeToString())

        often = [f"train/{name}" for name in ("loss", "token_accuracy", "lr", "gradient_norm")]
        often += [f"speed/{name}" for name in ("tokens_per_s", "samples_per_s", "step_s")]
        often += ["memory/rss_mib", "memory/peak_rss_mib", "epoch"]
        seldom = ["val/loss", "val/exact", "val/token_accuracy", *(f"val/lag_{lag}_exact" for lag in LAGS)]
        seldom += [f"state_norm/layer_{layer}" for layer in range(3)]
        for step in range(10, STEPS + 1, 10):
            write(step, often)
            if step % 100 == 0:
                write(step, seldom)
        writer.flush()
        file.seek(0)
        return file.read()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
