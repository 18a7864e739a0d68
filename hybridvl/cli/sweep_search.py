"""What `hybridvl sweep` says and checks of a study with a search: its space, its first trials, its best one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from rich import box
from rich.markup import escape
from rich.table import Table

from hybridvl.ablation.axes import Axis
from hybridvl.ablation.cells import cell_of, cells, runs
from hybridvl.ablation.local import Slot
from hybridvl.ablation.matching import Matched, match_cells
from hybridvl.ablation.search.trials import JOURNAL, Trials
from hybridvl.ablation.study import Study
from hybridvl.ablation.table import cell_table
from hybridvl.cli.output import table_console
from hybridvl.cli.recipe_check import check_fit, check_study
from hybridvl.cli.sweep_view import duration
from hybridvl.layers.errors import ConfigError

_SHOWN = 5  # of the first trials


def check_search(study: Study) -> None:
    """Raise ConfigError for what a fit would refuse of any label, or of the ends of a range."""
    assert study.search is not None
    found = runs(study, [entry.cell for entry in match_cells(study, cells(study))])
    check_study(study, found)
    if study.search.pruner == "hyperband":
        trainer = check_fit(found[0].arguments, "run")
        if trainer.max_steps in (None, -1) and trainer.max_epochs in (None, -1):
            raise ConfigError(
                f"{study.path}: search.pruner: 'hyperband' deals out the steps of a fit, and neither trainer.max_steps "
                "nor trainer.max_epochs is set; expected one of them, or another pruner"
            )


def show_search(study: Study, at_a_time: int, place: Slot | None) -> None:
    """What there is to choose from, and what the first trials cost.

    Args:
        study: a study with a search.
        at_a_time: runs at a time.
        place: where some steps of the first trials are measured; None: they are not.
    """
    assert study.search is not None
    for line in trial_lines(study):
        print(line)
    table_console().print(_space(study.axes))
    first = Trials(study, None)
    # What comes after the startup trials depends on how those end.
    known = max(1, study.search.startup) if study.search.sampler == "tpe" else _SHOWN
    count = min(_SHOWN, study.search.trials, known)
    asked = [trial for _ in range(count) if (trial := first.ask()) is not None]
    matched: list[Matched] = []
    for trial in asked:
        try:
            matched += match_cells(study, [cell_of(study, trial.labels)])
        except ConfigError as error:
            print(f"trial {trial.number} would fail: {error}")
    more = {} if place is None or not matched else _times(study, matched, at_a_time, place)
    table_console().print(cell_table(study, matched, more, title=f"the first {len(asked)} trials"))


def _space(axes: Sequence[Axis]) -> Table:
    """What each axis sets, and to what."""
    space = Table(title="the space", title_justify="left", box=box.ROUNDED)
    for heading in ("axis", "sets", "values"):
        space.add_column(heading, overflow="fold")
    for axis in axes:
        numbers = axis.range
        drawn = ", ".join(axis.values) if numbers is None else " to ".join(axis.values)
        if numbers is not None:
            drawn += f" in steps of {numbers.step:g}" if numbers.step else ", whole numbers" if numbers.is_whole else ""
            drawn += ", by orders of magnitude" if numbers.log else ""
        space.add_row(escape(axis.name), escape(axis.key or ""), escape(drawn))
    return space


def _times(study: Study, matched: Sequence[Matched], at_a_time: int, place: Slot) -> dict[str, list[str]]:
    """A column of how long the runs of the first trials would take; says how long the whole search would."""
    from hybridvl.cli.sweep_probe import measured_times

    assert study.search is not None
    count = len(matched)
    seconds = measured_times(runs(study, [entry.cell for entry in matched])[:count], place)
    known = [time for time in seconds if time is not None]
    if known:
        total = fmean(known) * study.search.trials * len(study.seeds) / at_a_time
        print(f"about {duration(total)} of training if no trial is given up, by a few steps of the first {count}")
    return {"training\nof a run": ["?" if time is None else duration(time) for time in seconds]}


def trial_lines(study: Study) -> list[str]:
    """How many trials ended how, and the best of them; nothing before the first was chosen."""
    if study.search is None or not (study.folder / JOURNAL).exists():
        return []
    found = Trials(study, study.folder).all()
    counts = Counter(trial.state for trial in found)
    shown = ", ".join(
        f"{counts[state]} {state}" for state in ("complete", "pruned", "failed", "running") if counts[state]
    )
    lines = [f"trials       {len(found)} of {study.search.trials} chosen: {shown}"] if found else []
    values = {trial.number: trial.value for trial in found if trial.state == "complete" and trial.value is not None}
    if values:
        best = (max if study.search.direction == "max" else min)(values, key=lambda number: values[number])
        trial = next(trial for trial in found if trial.number == best)
        labels = ", ".join(f"{name}={label}" for name, label in trial.labels.items())
        lines.append(f"best         {study.search.metric} {values[best]:.4f} with {labels}")
    return lines
