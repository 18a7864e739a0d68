"""Trains teachers, students and their equals from scratch on the built-in digits, and says what each stage reached.

    python benchmarks/distillation.py --root runs/distillation --out docs/benchmarks

Every cell is `hybridvl pipeline recipes/tiny/infinitevl.yaml` with a pattern, an inheritance and a seed, and beside it
`recipes/tiny/scratch.yaml`: the same model from random weights, for as many steps. What is done already is not run
again, so a killed run goes on, and `--report` tabulates what is there. Intervals are 95 %, of Student's t over seeds;
students and models from scratch are compared seed by seed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from scipy import stats

from hybridvl.bench.machine import describe
from hybridvl.layers.errors import ConfigError
from hybridvl.pipeline.description import Pipeline, read_pipeline
from hybridvl.pipeline.processes import Ended, run_process
from hybridvl.pipeline.runner import StageFailed, plan_steps, run_pipeline

RECIPES = Path(__file__).parents[1] / "recipes" / "tiny"
STAGES = ("layers", "logits", "supervised")
METRIC = "test/exact"

INTRODUCTION = """\
# Distillation on the built-in digits

Share of test questions answered exactly, by greedy generation, after each stage of `recipes/tiny/infinitevl.yaml`; mean
and 95 % interval of Student's t over three seeds, unless another number is given. *of its teacher* is the last stage
over the teacher of the same seed, *tokens* those of all stages over the teacher's. Models *from scratch* are the
students' layers from random weights, trained for as many steps of as many samples with the teacher's recipe
(`recipes/tiny/scratch.yaml`); the second table compares them seed by seed. `python benchmarks/distillation.py` makes
both; `distillation.json` has every metric of every run.
"""

Results = dict[tuple[str, str, int], dict[str, Any]]


def main(arguments: Sequence[str]) -> int:
    """Run what is missing and write distillation.json and distillation.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--out", type=Path, help="folder of the table")
    parser.add_argument("--patterns", nargs="+", default=["(swa gdn*3)*2", "gdn*8", "mamba2*8", "(full gdn*3)*2"])
    parser.add_argument("--inherit", nargs="+", default=["qkvo", "none"], choices=["qkvo", "none"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2, help="of each training, one core each")
    parser.add_argument("--report", action="store_true", help="run nothing")
    chosen = parser.parse_args(arguments)
    cells = [(p, how, seed) for p in chosen.patterns for seed in chosen.seeds for how in (*chosen.inherit, "scratch")]
    results: Results = {}
    try:
        for pattern, inherit, seed in cells:
            pipeline = cell(chosen.root, pattern, inherit, seed, chosen.processes)
            if not chosen.report:
                run_pipeline(pipeline, _launch)
            results[pattern, inherit, seed] = measured(pipeline)
    except (ConfigError, StageFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status if isinstance(error, StageFailed) else 2
    text = table(results)
    print(text)
    if chosen.out is not None:
        records = [
            {"pattern": pattern, "inherit": inherit, "seed": seed, "stages": stages}
            for (pattern, inherit, seed), stages in results.items()
        ]
        report = {**describe("cpu"), "processes": chosen.processes, "cells": records}
        (chosen.out / "distillation.json").write_text(json.dumps(report, indent=1) + "\n")
        (chosen.out / "distillation.md").write_text(text)
    return 0


def cell(root: Path, pattern: str, inherit: str, seed: int, processes: int) -> Pipeline:
    """The pipeline of a student, or of its equal from scratch; of one seed they share a folder, and so the teacher."""
    changes = {"root": str(root), "values.seed": str(seed), "values.pattern": pattern}
    if inherit == "scratch":
        path, stages = RECIPES / "scratch.yaml", ["scratch"]
        changes["name"] = f"scratch-{seed}"
    else:
        path, stages = RECIPES / "infinitevl.yaml", ["teacher", *STAGES]
        changes |= {"name": f"seed-{seed}", "values.inherit": inherit}
    as_described = read_pipeline(path)
    for name in stages:
        changes[f"stages.{name}.overrides.trainer.devices"] = str(processes)
        changes[f"stages.{name}.overrides.data.batch_size"] = str(_samples(as_described, name) // processes)
    return read_pipeline(path, changes)


def measured(pipeline: Pipeline) -> dict[str, Any]:
    """What is known of every stage that is done."""
    found = {}
    for step in plan_steps(pipeline):
        if step.action == "skip":
            facts = json.loads((step.run.folder / "metrics.json").read_text())
            names = ("parameters", "trainable_parameters", "steps", "tokens", "samples", "seconds")
            found[step.stage.name] = {name: facts[name] for name in names} | {"metrics": facts["metrics"]}
    return found


def table(results: Results) -> str:
    """The results as a page of Markdown."""
    teachers = {seed: run["teacher"] for (_, _, seed), run in results.items() if "teacher" in run}
    lines = [
        INTRODUCTION,
        "| model | layers | logits | supervised | of its teacher | tokens |",
        "|---|---|---|---|---|---|",
        f"| teacher `full*8` | | | {_interval(_exact(run) for run in teachers.values())} | | |",
    ]
    for pattern, how in dict.fromkeys((pattern, how) for pattern, how, _ in results):
        runs = {seed: run for (p, h, seed), run in results.items() if (p, h) == (pattern, how) and run}
        last = "scratch" if how == "scratch" else STAGES[-1]
        before = [_interval(_exact(run[stage]) for run in runs.values() if stage in run) for stage in STAGES[:-1]]
        done = {seed: run for seed, run in runs.items() if last in run and seed in teachers}
        share = [_exact(run[last]) / _exact(teachers[seed]) for seed, run in done.items()]
        tokens = [_tokens(run) / teachers[seed]["tokens"] for seed, run in done.items()]
        name = f"`{pattern}`, {'from scratch' if how == 'scratch' else how}"
        end = _interval(_exact(run[last]) for run in done.values())
        spent = f"{np.mean(tokens):.0%}" if tokens else ""
        lines.append(f"| {name} | {' | '.join(before)} | {end} | {_interval(share)} | {spent} |")
    return "\n".join([*lines, "", *_comparisons(results)]) + "\n"


def _comparisons(results: Results) -> list[str]:
    """Students minus models from scratch, seed by seed."""
    lines = ["| student | minus from scratch |", "|---|---|"]
    for pattern, how in dict.fromkeys((p, h) for p, h, _ in results if h != "scratch"):
        pairs = [
            (run["supervised"], results.get((pattern, "scratch", seed), {}).get("scratch"))
            for (p, h, seed), run in results.items()
            if (p, h) == (pattern, how) and "supervised" in run
        ]
        gains = [_exact(student) - _exact(scratch) for student, scratch in pairs if scratch is not None]
        lines.append(f"| `{pattern}`, {how} | {_interval(gains)} |")
    return lines


def _interval(values: Iterable[float]) -> str:
    """Mean and half the width of its 95 % interval, and of how many values unless there are three."""
    numbers = np.array(list(values))
    if not len(numbers):
        return ""
    if len(numbers) == 1:
        return f"{numbers[0]:.3f} (one seed)"
    half = stats.t.ppf(0.975, len(numbers) - 1) * stats.sem(numbers)
    return f"{numbers.mean():.3f} ± {half:.3f}" + ("" if len(numbers) == 3 else f" ({len(numbers)} seeds)")


def _exact(stage: Mapping[str, Any]) -> float:
    return float(stage["metrics"][METRIC])


def _tokens(run: Mapping[str, Any]) -> int:
    return sum(stage["tokens"] for name, stage in run.items() if name != "teacher")


def _samples(pipeline: Pipeline, name: str) -> int:
    """Samples of a step of a stage, which its recipes and overrides give to every process."""
    stage = next(stage for stage in pipeline.stages if stage.name == name)
    values = OmegaConf.merge(*(OmegaConf.load(recipe) for recipe in stage.recipes))
    batch = stage.overrides.get("data.batch_size", values.data.batch_size)
    return int(batch) * int(values.trainer.devices)


def _launch(arguments: list[str]) -> Ended:
    return run_process([sys.executable, "-m", "hybridvl", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
