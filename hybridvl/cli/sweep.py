"""`hybridvl sweep`: all runs of a study, resumable, beside each other, without doing one twice."""

from __future__ import annotations

import argparse
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hybridvl.ablation.cells import Run, cells, runs
from hybridvl.ablation.engine import OVER, Engine, Work
from hybridvl.ablation.local import LocalEngine, Slot, own_slots
from hybridvl.ablation.matching import Matched, match_cells
from hybridvl.ablation.ray_tune import run_on_ray
from hybridvl.ablation.records import RunRecord
from hybridvl.ablation.search.space import Search
from hybridvl.ablation.slurm import run_on_slurm
from hybridvl.ablation.study import Study, read_study
from hybridvl.ablation.study_record import compare_study, record_study
from hybridvl.ablation.table import cell_table
from hybridvl.cli.arguments import Arguments, take_flags
from hybridvl.cli.output import table_console
from hybridvl.cli.sweep_view import SweepView, duration
from hybridvl.layers.errors import ConfigError
from hybridvl.pipeline.mappings import yaml_value

_FLAG = re.compile(
    r"--(?P<key>name|root|recipe|seeds|exclude|baseline|match|metrics|search"
    r"|(?:values|overrides|axes|match|search)\.[^=]+)"
    r"(?:=(?P<value>.*))?",
    re.DOTALL,
)
_SLURM_FLAG = re.compile(r"--slurm\.(?P<key>[^=]+)(?:=(?P<value>.*))?", re.DOTALL)


def main(argv: Sequence[str]) -> int:
    """Run what is not done; returns 0, 1 if runs have failed or were killed, 128 and the signal after one."""
    rest, flags = take_flags(argv, _FLAG)
    rest, slurm_flags = take_flags(rest, _SLURM_FLAG)
    options = _parser().parse_args(rest)
    for flag, value in (("--jobs", options.jobs), ("--cores", options.cores)):
        if value is not None and value < 1:
            raise ConfigError(f"{flag}: {value}; expected at least 1")
    _refuse_idle_flags(options, [match["key"] for match, _ in slurm_flags])
    slurm = {match["key"]: yaml_value(f"--slurm.{match['key']}", value) for match, value in slurm_flags}
    study = read_study(Path(options.file), {match["key"]: value for match, value in flags})
    if study.search is not None:
        return _search(study, study.search, options, slurm)
    matched = match_cells(study, cells(study))
    found = runs(study, [entry.cell for entry in matched])
    over = {*OVER, *([] if options.retry_failed else ["failed"])}
    left = [run for run in found if RunRecord(run.folder).state not in over]
    if left:
        from hybridvl.cli.recipe_check import check_study  # Lightning takes seconds to import

        check_study(study, left)
    if options.dry_run:
        compare_study(study, options.extend)
        print(f"{len(left)} of {len(found)} runs to do, {_pace(options)}")
        _show(study, matched, found, left, options)
        return 0
    record_study(study, options.extend)
    with SweepView(study.metrics or ("test/exact",)) as view:
        engine = _run(Work(found, study.folder, options.retry_failed, view), options, slurm)
    return _report(study, found, engine, view)


def _search(study: Study, search: Search, options: argparse.Namespace, slurm: Mapping[str, Any]) -> int:
    """The same for a study whose cells are chosen one after another."""
    if options.engine == "ray":
        raise ConfigError(
            f"--engine ray: {study.path} has a search, whose trials are chosen one after another, and Ray is given all "
            "runs at once; expected --engine slurm, or local, also on several machines that share the study's folder"
        )
    from hybridvl.ablation.search.engine import SearchEngine  # Optuna, and Lightning, take long to import
    from hybridvl.cli.sweep_search import check_search, show_search, trial_lines

    check_search(study)
    if options.dry_run:
        compare_study(study, options.extend)
        print(f"{search.trials} trials x {len(study.seeds)} seeds, {_pace(options)}")
        show_search(study, _at_a_time(options), _probed_in(options))
        return 0
    record_study(study, options.extend)
    with SweepView(study.metrics) as view:
        work = Work([], study.folder, options.retry_failed, view)
        engine: Engine
        if options.engine == "slurm":
            engine = run_on_slurm(work, options.jobs or 1, slurm, study)
        else:
            engine = searching = SearchEngine(study, work, own_slots(options.jobs))
            searching.run()
    return _report(study, engine.runs, engine, view, trial_lines(study))


def _refuse_idle_flags(options: argparse.Namespace, slurm: Sequence[str]) -> None:
    """Raise ConfigError for flags that nothing would look at."""
    if slurm and options.engine != "slurm":
        raise ConfigError(f"--slurm.{slurm[0]}: expected --engine slurm with it")
    if options.cores is not None and options.engine != "ray":
        raise ConfigError(f"--cores: {options.cores}; expected --engine ray with it")
    if not options.probe and not options.dry_run:
        raise ConfigError("--no-probe: expected --dry-run with it")


def _run(work: Work, options: argparse.Namespace, slurm: Mapping[str, Any]) -> Engine:
    """All runs, by the engine that was asked for."""
    if options.engine == "slurm":
        return run_on_slurm(work, options.jobs or 1, slurm)
    if options.engine == "ray":
        return run_on_ray(work, options.jobs, options.cores or 1)
    engine = LocalEngine(work, own_slots(options.jobs))
    engine.run()
    return engine


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="hybridvl sweep",
        description="Run a study: every cell of its axes with every seed, each as a process of its own (hybridvl fit), "
        "several at a time. What is done is skipped, what was stopped goes on from its last checkpoint; several sweeps "
        "of one study share the work. Ctrl-C stops; the same command goes on.",
        epilog="example: hybridvl sweep ablations/window.yaml --jobs 2 --seeds '[0, 1]'",
    )
    parser.add_argument("file", metavar="FILE", help="YAML: name, root, recipe, overrides, axes, seeds, ...")
    parser.add_argument(
        "--engine",
        choices=("local", "slurm", "ray"),
        default="local",
        help="processes of this machine; jobs of Slurm, by submitit; trials of Ray Tune, but for a study with a search",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="runs at a time; by default one a GPU, else one a core. With Slurm: jobs, by default 1, each of which has "
        "as many runs at a time as GPUs or cores",
    )
    parser.add_argument("--cores", type=int, metavar="N", help="with Ray: cores of a run (default 1)")
    parser.add_argument(
        "--slurm.KEY", metavar="VALUE", help="a parameter of submitit, such as timeout_min or slurm_partition"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, show the cells, do nothing")
    parser.add_argument("--no-probe", dest="probe", action="store_false", help="in a dry run, measure no steps")
    parser.add_argument("--extend", action="store_true", help="allow cells, seeds and trials beyond those so far")
    parser.add_argument("--retry-failed", action="store_true", help="try runs again that have failed")
    for key, what in (("name", "folder of the study"), ("root", "folder of all studies"), ("seeds", "list of seeds")):
        parser.add_argument(f"--{key}", metavar="VALUE", help=f"{what}, in place of the file's")
    parser.add_argument("--overrides.PATH", metavar="VALUE", help="a value of the recipe, by its path there")
    parser.add_argument("--axes.NAME.values", metavar="VALUE", help="in place of the values of an axis")
    parser.add_argument("--search.KEY", metavar="VALUE", help="in place of a key of the search, such as trials")
    parser.add_argument("--values.KEY", metavar="VALUE", help="in place of one of the file's values")
    return parser


def _pace(options: argparse.Namespace) -> str:
    """How many runs there would be at a time."""
    count = _at_a_time(options)
    if options.engine == "slurm":
        return f"by {count} {'job' if count == 1 else 'jobs'}, each with one at a time or more"
    return f"{count} at a time" + (" or more" if options.engine == "ray" and options.jobs is None else "")


def _at_a_time(options: argparse.Namespace) -> int:
    """The same as a number, the least where a cluster decides."""
    return len(own_slots(options.jobs)) if options.engine == "local" else options.jobs or 1


def _probed_in(options: argparse.Namespace) -> Slot | None:
    """Where a dry run measures some steps, as a run would have it; None where it does not."""
    return own_slots(options.jobs if options.engine == "local" else None)[0] if options.probe else None


def _show(
    study: Study,
    matched: Sequence[Matched],
    found: Sequence[Run],
    left: Sequence[Run],
    options: argparse.Namespace,
) -> None:
    """The cells, what they cost, and how long the runs that are left would take."""
    more = {}
    place = _probed_in(options)
    if place is not None and left:
        from hybridvl.cli.sweep_probe import measured_times

        first = {run.cell.name: run for run in reversed(found)}
        seconds = dict(zip(first, measured_times(list(first.values()), place), strict=True))
        known = {name: value for name, value in seconds.items() if value is not None}
        times = [duration(known[entry.cell.name]) if entry.cell.name in known else "?" for entry in matched]
        more = {"training\nof a run": times}
        unknown = sum(run.cell.name not in known for run in left)
        total = sum(known[run.cell.name] for run in left if run.cell.name in known) / _at_a_time(options)
        besides = f", and {unknown} runs of unknown length" if unknown else ""
        print(f"about {duration(total)} of training{besides}, by a few steps of every cell")
    table_console().print(cell_table(study, matched, more))


def _report(study: Study, found: Sequence[Run], engine: Engine, view: SweepView, trials: Sequence[str] = ()) -> int:
    print("\n".join((f"\n{study.name}: {view.summary(engine)}", *trials)))
    for index, (run, status) in enumerate(zip(found, engine.statuses, strict=True)):
        if status in ("failed", "stopped"):
            log = engine.records[index].log
            why = engine.reason(index) or ("" if log.exists() else "it was not begun")
            print(f"{status:9} {run.folder}: {why}" + (f" (log: {log})" if log.exists() else ""))
    for trouble in engine.troubles:
        print(trouble)
    counts = Counter(engine.statuses)
    if engine.signal is not None:
        print("stopped; the same command goes on")
        return 128 + engine.signal
    if counts["failed"]:
        print("once that is mended, the same command with --retry-failed tries the failed ones again")
    if counts["stopped"]:
        print("the same command goes on with those that were stopped")
    if engine.ahead:
        print(f"the same command goes on with the search, of which {engine.ahead} runs or fewer were not begun")
    print(f"report       hybridvl report {shlex.quote(str(study.folder))}")
    print(f"watch        tensorboard --logdir {shlex.quote(str(study.folder))}")
    return int(sum(counts[status] for status in OVER.values()) < len(found) + engine.ahead)
