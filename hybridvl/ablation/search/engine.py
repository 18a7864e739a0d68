"""The engine of a search: chooses a trial when there is room, gives up what goes badly, and tells how trials ended."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from hybridvl.ablation.cells import Run, cell_of, runs
from hybridvl.ablation.engine import Engine, Onlooker, SignalFile, Work
from hybridvl.ablation.local import LocalEngine, Slot
from hybridvl.ablation.matching import match_cells
from hybridvl.ablation.records import RunRecord
from hybridvl.ablation.search.trials import Ending, Point, Trial, Trials
from hybridvl.ablation.study import Study
from hybridvl.layers.errors import ConfigError

_POLL_OTHERS = 2.0  # seconds between two looks at what other sweeps have chosen


class SearchEngine(LocalEngine):
    """Runs the trials of a search: each with the first seed, and with the others if it has come through that.

    What stands on disk about the runs is the truth: trials that a killed sweep has left are gone on with, and told to
    the search when their runs have ended, whoever ran them.

    Args:
        study: a study with a search.
        work: without runs, which follow from the search.
        places: where; one process each at a time.
        signals: that it gets by a file, besides those of its own process.
    """

    def __init__(self, study: Study, work: Work, places: Sequence[Slot], signals: SignalFile | None = None) -> None:
        super().__init__(work, places, signals)
        assert study.search is not None
        self._study, self._search = study, study.search
        self._trials = Trials(study, study.folder)
        self._chosen = _Chosen(study, self)
        self._open: dict[int, Trial] = {}  # trials by the place of their first run, while its end is not known
        self._judged: dict[int, int] = {}  # validations of first runs that have been looked at
        self._bytes: dict[int, int] = {}  # of the files that they were read from
        self._mistake: ConfigError | None = None
        self._looked_at_trials = float("-inf")
        self._may_choose = True

    def run(self) -> None:
        """As of any study; a mistake that shows only now stops all runs in order, and is raised then."""
        super().run()
        if self._mistake is not None:
            raise self._mistake

    def _reap(self) -> None:
        self._guarded(self._judge_running)
        before = len(self._running)
        super()._reap()
        if len(self._running) < before:
            self._looked_at_trials = float("-inf")

    def _fill(self) -> None:
        self._guarded(self._fill_and_choose)

    def _guarded(self, step: Callable[[], None]) -> None:
        if self._stopping():
            return
        try:
            step()
        except ConfigError as error:
            self._mistake = error
            self._hand_on(signal.SIGTERM, kill=False)

    def _fill_and_choose(self) -> None:
        """Start what waits; with room left, go on with the next seeds of trials, or choose another trial."""
        while True:
            if time.monotonic() - self._looked_at_trials >= _POLL_OTHERS:
                self._look_at_trials()
            before = list(self.statuses)
            super()._fill()
            if self._stopping() or "waiting" in self.statuses or not self._free:
                return
            if self.statuses != before:
                self._looked_at_trials = float("-inf")
            elif not self._choose():
                return

    def _choose(self) -> bool:
        """Whether there was one more trial to choose; once there was none, nobody asks until the next look at them."""
        trial = self._trials.ask() if self._may_choose else None
        self._may_choose = trial is not None
        if trial is not None:
            self._go_on_with(trial)
            self._chosen.count_ahead()
        return trial is not None

    def _look_at_trials(self) -> None:
        """Take up what other sweeps have chosen, tell what has ended."""
        found = self._trials.all()
        for trial in found:
            self._go_on_with(trial)
        self._chosen.count_ahead()
        self._looked_at_trials = time.monotonic()
        self._may_choose = True

    def _go_on_with(self, trial: Trial) -> None:
        """Let as many of its runs count as it has come to, and tell the search how it ended."""
        counting = self._chosen.places(trial)
        if not counting:  # its budget cannot be matched: the others are no worse for it
            if trial.state == "running":
                self._trials.tell(trial, "failed")
            return
        first = counting[0]
        if trial.state == "running":
            self._open[first] = trial
        if self.statuses[first] == "done" and first in self._open:
            self._judge(first, has_ended=True)
        elif trial.state == "pruned" and self.statuses[first] not in ("pruned", "running"):
            self._give_up(first, trial.given_up, trial.value, has_ended=True)  # the sweep that judged it was killed
        status = self.statuses[first]
        if status == "pruned":
            self._told(trial, first, "pruned")
        elif status == "done":
            places = self._chosen.places(trial, len(self._study.seeds))
            if trial.state == "complete":
                return
            statuses = [self.statuses[place] for place in places]
            if all(status == "done" for status in statuses):
                value = fmean(self._value(place) for place in places)
                self._told(trial, first, "failed" if math.isnan(value) else value)
            elif "failed" in statuses and set(statuses) <= {"done", "failed"}:
                self._told(trial, first, "failed")
        elif status == "failed":
            self._told(trial, first, "failed")

    def _told(self, trial: Trial, first: int, value: Ending) -> None:
        if trial.state == "running" or (trial.state == "failed" and value != "failed"):
            self._trials.tell(trial, value)
            self._open.pop(first, None)

    def _judge_running(self) -> None:
        for running in list(self._running):
            curve = running.record.curve
            size = curve.stat().st_size if curve.exists() else 0
            if running.index not in self._open or size == self._bytes.get(running.index, 0):
                continue
            self._bytes[running.index] = size
            if self._judge(running.index, has_ended=False):
                running.process.send_signal(signal.SIGTERM)

    def _judge(self, first: int, has_ended: bool) -> bool:
        """Report the validations of a trial's first run; whether it was given up for one of them."""
        record, trial = self.records[first], self._open[first]
        curve = self._curve(record)
        new = curve[self._judged.get(first, 0) :]
        if not new and not has_ended:
            return False
        self._judged[first] = len(curve)
        point = self._trials.judge(trial, new, has_ended)
        if point is None:
            return False
        self._open.pop(first)
        self._give_up(first, point.step, point.value, has_ended)
        return True

    def _give_up(self, first: int, step: int | None, value: float | None, has_ended: bool) -> None:
        shown = "" if value is None else f", with {self._search.metric} {value:.4g}"
        self.records[first].prune(f"at step {step}{shown}")
        if has_ended:
            self.statuses[first] = "pruned"

    def _curve(self, record: RunRecord) -> list[Point]:
        """The search's metric at each validation of a run, once each, though a resumed run may repeat some."""
        found: dict[int, Point] = {}
        for entry in record.validations:
            value = entry["metrics"].get(self._search.metric)
            if value is None:
                raise self._not_logged(record, entry["metrics"])
            found.setdefault(entry["step"], Point(entry["step"], entry["steps"], value))
        return list(found.values())

    def _value(self, place: int) -> float:
        metrics = self.records[place].metrics.get("metrics", {})
        value = metrics.get(self._search.metric)
        if value is None:
            raise self._not_logged(self.records[place], metrics)
        return float(value)

    def _not_logged(self, record: RunRecord, metrics: dict[str, float]) -> ConfigError:
        known = ", ".join(sorted(name for name in metrics if name.startswith("val/"))) or "none of the validation"
        return ConfigError(
            f"{self._study.path}: search.metric: {self._search.metric!r} was not logged by {record.folder}; "
            f"it logged {known}; another metric needs a study of another name"
        )


class SearchOnlooker(Onlooker):
    """Looks on while processes that a cluster has started search together, each with an engine of its own.

    Args:
        study: a study with a search.
        work: without runs, which follow from the search.
        folder: of what the cluster's tool writes.
    """

    def __init__(self, study: Study, work: Work, folder: Path) -> None:
        super().__init__(work, folder)
        self._trials = Trials(study, study.folder)
        self._chosen = _Chosen(study, self)
        self._take_up()
        self._chosen.count_ahead()

    @property
    def share(self) -> Work:
        """The same, without runs: the processes choose them."""
        return replace(super().share, runs=())

    def _look(self) -> None:
        self._take_up()
        super()._look()
        self._chosen.count_ahead()  # by how runs stand now

    def _take_up(self) -> None:
        for trial in self._trials.all():
            self._chosen.places(trial, self._chosen.begun(trial))


class _Chosen:
    """The runs of trials in an engine, which has more and more of them."""

    def __init__(self, study: Study, engine: Engine) -> None:
        self._study, self._engine = study, engine
        self._planned: dict[int, list[Run]] = {}  # runs of each trial by its number, in the order of seeds
        self._places: dict[int, list[int]] = {}  # in the engine, of those that count so far

    def places(self, trial: Trial, count: int = 1) -> list[int]:
        """Where a trial's runs are in the engine; at least so many of them count from now on.

        Nowhere, if the trial has none, as its budget cannot be matched.
        """
        known = self._places.setdefault(trial.number, [])
        for run in self._runs(trial)[len(known) : count]:
            known.append(self._engine.add(run))
        return known

    def begun(self, trial: Trial) -> int:
        """How many of a trial's runs were started, the first counting as such."""
        return max(1, sum(RunRecord(run.folder).started.exists() for run in self._runs(trial)))

    def count_ahead(self) -> None:
        """Say how many runs are to come, if no more trials are given up."""
        assert self._study.search is not None
        statuses = [self._engine.statuses[known[0]] for known in self._places.values() if known]
        alone = sum(status in ("pruned", "failed") for status in statuses)
        without = sum(not known for known in self._places.values())
        seeds = len(self._study.seeds)
        whole = self._study.search.trials - alone - without
        self._engine.ahead = whole * seeds + alone - len(self._engine.runs)

    def _runs(self, trial: Trial) -> list[Run]:
        if trial.number not in self._planned:
            self._planned[trial.number] = self._plan(trial)
        return self._planned[trial.number]

    def _plan(self, trial: Trial) -> list[Run]:
        """A trial's runs; none, and a trouble, if its budget cannot be matched."""
        cell = cell_of(self._study, trial.labels)
        if self._study.matches:
            try:
                cell = match_cells(self._study, [cell])[0].cell
            except ConfigError as error:
                self._engine.troubles.append(f"trial {trial.number} failed: {error}")
                return []
        return runs(self._study, [cell])
