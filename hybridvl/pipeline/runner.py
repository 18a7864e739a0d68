"""Which stages are to run, and running them: what is done is skipped, what was killed goes on, the rest starts anew."""

from __future__ import annotations

import contextlib
import fcntl
import shlex
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from hybridvl.layers.errors import ConfigError
from hybridvl.pipeline.description import Pipeline, Stage
from hybridvl.pipeline.mappings import fit_words
from hybridvl.pipeline.processes import Ended
from hybridvl.pipeline.records import StageRun, find_run, new_run, stage_key
from hybridvl.pipeline.references import filled

Launch = Callable[[list[str]], Ended]


@dataclass(frozen=True)
class Step:
    """What a stage comes to now.

    Attributes:
        stage: the stage.
        action: "skip" what is done, "resume" what was killed, "run" what is new.
        run: its run folder.
        key: see `stage_key`; None while a stage that it needs is still to run.
        why: the reason, for people.
    """

    stage: Stage
    action: Literal["skip", "resume", "run"]
    run: StageRun
    key: str | None
    why: str


class StageFailed(Exception):
    """A stage that did not end well.

    Args:
        message: which, how, and what to do now.
        status: exit status of the command line.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def plan_steps(pipeline: Pipeline, start: str | None = None) -> list[Step]:
    """What would happen to every stage now; `start` and all later ones are to run again, done or not."""
    anew = _from(pipeline, start)
    steps: list[Step] = []
    for stage in pipeline.stages:
        steps.append(_step(pipeline, stage, steps, stage.name in anew))
    return steps


def run_pipeline(
    pipeline: Pipeline, launch: Launch, start: str | None = None, say: Callable[[str], None] = print
) -> list[StageRun]:
    """Run what is to be run, stage by stage; returns the run of every stage.

    Args:
        pipeline: the stages.
        launch: runs `hybridvl` with arguments as a process and says how it ended.
        start: this stage and all later ones run again, done or not.
        say: told what happens, line by line.

    Raises:
        StageFailed: a stage did not end well; the later ones have not been started.
        ConfigError: another process runs the pipeline, or its folder cannot be written.
    """
    anew = _from(pipeline, start)
    steps: list[Step] = []
    with _only_process(pipeline.folder):
        for stage in pipeline.stages:
            step = _step(pipeline, stage, steps, stage.name in anew)
            if step.action != "skip":
                _run(pipeline, step, steps, launch, say)
            steps.append(step)
    return [step.run for step in steps]


def fit_arguments(pipeline: Pipeline, step: Step, earlier: Sequence[Step]) -> list[str]:
    """What follows `hybridvl` to run a stage."""
    results: dict[str, Any] = {}
    for done in earlier:
        results[f"stages.{done.stage.name}.model"] = str(done.run.model)
        results[f"stages.{done.stage.name}.folder"] = str(done.run.folder)
    overrides = {
        **filled(step.stage.overrides, results),
        "run.root": str(pipeline.folder),
        "run.name": step.stage.name,
        "run.version": step.run.folder.name,
    }
    if step.action == "resume":
        overrides["ckpt_path"] = str(step.run.checkpoint)
    return fit_words(step.stage.recipes, overrides)


def _from(pipeline: Pipeline, start: str | None) -> set[str]:
    names = [stage.name for stage in pipeline.stages]
    if start is None:
        return set()
    if start not in names:
        raise ConfigError(f"--from: no stage is called {start!r}; the stages are {', '.join(names)}")
    return set(names[names.index(start) :])


def _step(pipeline: Pipeline, stage: Stage, earlier: Sequence[Step], anew: bool) -> Step:
    folder = pipeline.folder / stage.name
    fresh = new_run(folder)
    needed = {step.stage.name: step.run for step in earlier if step.stage.name in stage.needs}
    waits_for = [name for name, run in needed.items() if not run.is_done]
    if waits_for:
        return Step(stage, "run", fresh, None, f"after {', '.join(waits_for)}")
    key = stage_key(stage, {name: run.mark for name, run in needed.items()})
    if anew:
        return Step(stage, "run", fresh, key, "asked for with --from")
    found = find_run(folder, key)
    if found is None:
        changed = fresh.folder.name != "version_0"
        return Step(stage, "run", fresh, key, "its recipe, overrides or source changed" if changed else "new")
    if found.is_done:
        return Step(stage, "skip", found, key, "done")
    if found.checkpoint.exists():
        return Step(stage, "resume", found, key, f"was not finished; from {found.checkpoint}")
    return Step(stage, "run", fresh, key, f"{found.folder.name} ended before its first checkpoint")


def _run(pipeline: Pipeline, step: Step, earlier: Sequence[Step], launch: Launch, say: Callable[[str], None]) -> None:
    place = f"{len(earlier) + 1} of {len(pipeline.stages)}"
    arguments = fit_arguments(pipeline, step, earlier)
    say(f"\nstage {step.stage.name} ({place}, {step.why})")
    say(f"hybridvl {shlex.join(arguments)}")
    if step.action == "run":
        assert step.key is not None  # all that it needs is done by now
        step.run.begin(step.stage, step.key, arguments)
    ended = launch(arguments)
    if ended.status or ended.signal is not None:
        step.run.forget_refused()
        raise _failure(step, ended)
    step.run.finish(datetime.now(UTC).isoformat())


def _failure(step: Step, ended: Ended) -> StageFailed:
    status = 128 - ended.status if ended.status < 0 else ended.status
    goes_on = f"goes on from {step.run.checkpoint}" if step.run.checkpoint.exists() else "starts the stage again"
    now = f"the same command {goes_on}"
    if ended.signal is not None:
        how, status = "was interrupted", 128 + ended.signal
    elif ended.status < 0:
        how = f"was ended by {signal.Signals(-ended.status).name}"
        if -ended.status == signal.SIGKILL:
            how += ", perhaps for want of memory (a smaller data.batch_size with trainer.accumulate_grad_batches helps)"
    else:
        how = f"failed with exit status {ended.status}, for the reason above"
        now = f"once that is mended, {now}"
    changes = "" if goes_on.startswith("starts") else "; with other recipes or overrides it starts anew"
    return StageFailed(f"stage {step.stage.name!r} {how}; {now}{changes}", status)


@contextlib.contextmanager
def _only_process(folder: Path) -> Iterator[None]:
    """Hold the pipeline's folder, so that two processes do not run the same stage."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise ConfigError(f"root: {folder}: cannot be written: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{folder}: another process runs this pipeline now") from error
        yield
