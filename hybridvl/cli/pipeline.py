"""`hybridvl pipeline`: the stages of a training, one after another, each resumable and skipped when it is done."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from hybridvl.cli.arguments import Arguments, take_flags
from hybridvl.cli.output import table_console
from hybridvl.layers.errors import within
from hybridvl.pipeline.description import Pipeline, read_pipeline
from hybridvl.pipeline.processes import Ended, run_process
from hybridvl.pipeline.runner import StageFailed, Step, fit_arguments, plan_steps, run_pipeline

_FLAG = re.compile(r"--(?P<key>name|root|values\.[^=]+|stages\.[^=]+)(?:=(?P<value>.*))?", re.DOTALL)
_ACTIONS = {"skip": "done", "resume": "goes on", "run": "to run"}


def main(argv: Sequence[str]) -> int:
    """Run what is not done yet; returns 0, or the exit status of the stage that failed. Mistakes are ConfigErrors."""
    rest, flags = take_flags(argv, _FLAG)
    options = _parser().parse_args(rest)
    pipeline = read_pipeline(Path(options.file), {match["key"]: value for match, value in flags})
    steps = plan_steps(pipeline, options.start)
    _show(pipeline, steps)
    for number, step in enumerate(steps):
        if step.action != "skip":
            _check(step, fit_arguments(pipeline, step, steps[:number]))
    if options.dry_run:
        return 0
    try:
        runs = run_pipeline(pipeline, _launch, options.start, lambda line: print(line, flush=True))
    except StageFailed as failed:
        print(f"error: {failed}", file=sys.stderr)
        return failed.status
    print(f"\nmodel        {runs[-1].model}")
    print(f"watch        tensorboard --logdir {shlex.quote(str(pipeline.folder))}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="hybridvl pipeline",
        description="Run the stages of a pipeline file, each as a process of its own: hybridvl fit with the stage's "
        "recipe and overrides. A stage that is done is skipped, one that was killed goes on from its last checkpoint, "
        "one that has changed runs again, and so do those that start from its model.",
        epilog="example: hybridvl pipeline recipes/tiny/infinitevl.yaml --values.seed 1",
    )
    parser.add_argument("file", metavar="FILE", help="YAML: name, root, values, stages")
    parser.add_argument("--dry-run", action="store_true", help="check all stages, say what is to be done, do nothing")
    parser.add_argument(
        "--from", dest="start", metavar="STAGE", help="run this stage and all later ones again, done or not"
    )
    parser.add_argument("--name", metavar="NAME", help="in place of the file's name")
    parser.add_argument("--root", metavar="DIR", help="folder of all runs, in place of the file's")
    parser.add_argument("--values.KEY", metavar="VALUE", help="in place of one of the file's values")
    parser.add_argument(
        "--stages.STAGE.overrides.PATH", metavar="VALUE", help="a value of a stage's recipe, by its path there"
    )
    return parser


def _show(pipeline: Pipeline, steps: Sequence[Step]) -> None:
    table = Table(title=f"{pipeline.name}: {len(steps)} stages", title_justify="left")
    for column in ("stage", "", "why", "run folder"):
        table.add_column(column, overflow="fold")
    for step in steps:
        why = "" if step.action == "skip" else step.why
        table.add_row(step.stage.name, _ACTIONS[step.action], why, str(step.run.folder))
    table_console().print(table)


def _launch(arguments: list[str]) -> Ended:
    return run_process([sys.executable, "-m", "hybridvl", *arguments])


def _check(step: Step, arguments: Sequence[str]) -> None:
    """Have the command line read a stage's recipe and overrides, so that a mistake shows before any stage has run."""
    from hybridvl.cli.recipe_check import check_fit  # Lightning takes seconds to import

    if step.key is None and "model.source" in step.stage.overrides:
        # The folder that says what the model is may be still to come; any model will do here.
        arguments = [arguments[0], '--model.net={"pattern": "full"}', *arguments[1:]]
    with within(f"stages.{step.stage.name}"):
        check_fit(arguments, "stage")
