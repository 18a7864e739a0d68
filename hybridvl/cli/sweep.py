"""`hybridvl sweep`: all runs of a study, resumable, beside each other, without doing one twice."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hybridvl.ablation.cells import Run, cells, runs
from hybridvl.ablation.local import LocalEngine, Slot, slots
from hybridvl.ablation.matching import Matched, match_cells
from hybridvl.ablation.records import RunRecord
from hybridvl.ablation.study import Study, read_study
from hybridvl.ablation.study_record import record_study
from hybridvl.ablation.table import cell_table
from hybridvl.cli.arguments import Arguments, take_flags
from hybridvl.cli.output import table_console
from hybridvl.cli.sweep_view import SweepView, duration
from hybridvl.layers.errors import ConfigError

_FLAG = re.compile(
    r"--(?P<key>name|root|recipe|seeds|exclude|baseline|match|metrics|(?:values|overrides|axes|match)\.[^=]+)"
    r"(?:=(?P<value>.*))?",
    re.DOTALL,
)


def main(argv: Sequence[str]) -> int:
    """Run what is not done; returns 0, 1 if runs have failed or were killed, 128 and the signal after one."""
    rest, flags = take_flags(argv, _FLAG)
    options = _parser().parse_args(rest)
    if options.jobs is not None and options.jobs < 1:
        raise ConfigError(f"--jobs: {options.jobs}; expected at least 1")
    study = read_study(Path(options.file), {match["key"]: value for match, value in flags})
    matched = match_cells(study, cells(study))
    found = runs(study, [entry.cell for entry in matched])
    places = _places(options.jobs)
    left = [run for run in found if RunRecord(run.folder).state != "done"]
    if left:
        from hybridvl.cli.recipe_check import check_study  # Lightning takes seconds to import

        check_study(study, left)
    if options.dry_run:
        _show(study, matched, found, left, places, options.probe)
        return 0
    record_study(study, options.extend)
    with SweepView(study.metrics or ("test/exact",), len(places)) as view:
        engine = LocalEngine(found, places, options.retry_failed, view)
        engine.run()
    return _report(study, found, engine, view)


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="hybridvl sweep",
        description="Run a study: every cell of its axes with every seed, each as a process of its own (hybridvl fit), "
        "several at a time. What is done is skipped, what was stopped goes on from its last checkpoint; several sweeps "
        "of one study share the work. Ctrl-C stops; the same command goes on.",
        epilog="example: hybridvl sweep ablations/window.yaml --jobs 2 --seeds '[0, 1]'",
    )
    parser.add_argument("file", metavar="FILE", help="YAML: name, root, recipe, overrides, axes, seeds, ...")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time; by default one a GPU, else one a core")
    parser.add_argument("--dry-run", action="store_true", help="check everything, show the cells, do nothing")
    parser.add_argument("--no-probe", dest="probe", action="store_false", help="in a dry run, measure no steps")
    parser.add_argument("--extend", action="store_true", help="allow cells and seeds that the study has not had so far")
    parser.add_argument("--retry-failed", action="store_true", help="try runs again that have failed")
    for key, what in (("name", "folder of the study"), ("root", "folder of all studies"), ("seeds", "list of seeds")):
        parser.add_argument(f"--{key}", metavar="VALUE", help=f"{what}, in place of the file's")
    parser.add_argument("--overrides.PATH", metavar="VALUE", help="a value of the recipe, by its path there")
    parser.add_argument("--axes.NAME.values", metavar="VALUE", help="in place of the values of an axis")
    parser.add_argument("--values.KEY", metavar="VALUE", help="in place of one of the file's values")
    return parser


def _show(
    study: Study, matched: Sequence[Matched], found: Sequence[Run], left: Sequence[Run], places: list[Slot], probe: bool
) -> None:
    """The cells, what they cost, and how long the runs that are left would take."""
    print(f"{len(left)} of {len(found)} runs to do, {len(places)} at a time")
    more = {}
    if probe and left:
        from hybridvl.cli.sweep_probe import measured_times

        first = {run.cell.name: run for run in reversed(found)}
        seconds = dict(zip(first, measured_times(list(first.values()), places[0]), strict=True))
        known = {name: value for name, value in seconds.items() if value is not None}
        times = [duration(known[entry.cell.name]) if entry.cell.name in known else "?" for entry in matched]
        more = {"training\nof a run": times}
        unknown = sum(run.cell.name not in known for run in left)
        total = sum(known[run.cell.name] for run in left if run.cell.name in known) / len(places)
        besides = f", and {unknown} runs of unknown length" if unknown else ""
        print(f"about {duration(total)} of training{besides}, by a few steps of every cell")
    table_console().print(cell_table(study, matched, more))


def _places(jobs: int | None) -> list[Slot]:
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    return slots(jobs, cores, _gpus())


def _gpus() -> list[str]:
    """What this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None and torch.cuda.is_available():
        return [name for name in given.split(",") if name]
    return [str(number) for number in range(torch.cuda.device_count())]


def _report(study: Study, found: Sequence[Run], engine: LocalEngine, view: SweepView) -> int:
    print(f"\n{study.name}: {view.summary(engine)}")
    for run, record, status in zip(found, engine.records, engine.statuses, strict=True):
        if status in ("failed", "stopped"):
            print(f"{status:9} {run.folder}: {record.reason} (log: {record.log})")
    counts = Counter(engine.statuses)
    if engine.signal is not None:
        print("stopped; the same command goes on")
        return 128 + engine.signal
    if counts["failed"]:
        print("once that is mended, the same command with --retry-failed tries the failed ones again")
    if counts["stopped"]:
        print("the same command goes on with those that were stopped")
    print(f"report       hybridvl report {shlex.quote(str(study.folder))}")
    print(f"watch        tensorboard --logdir {shlex.quote(str(study.folder))}")
    return int(counts["done"] < len(found))
