"""What a sweep shows while it runs: a live table on a terminal, a line for every change elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hybridvl.ablation.engine import Engine, Status

_MOST_ROWS = 40
# In this order where not all have room.
_SHOWN: tuple[Status, ...] = ("running", "failed", "stopped", "elsewhere", "waiting", "pruned", "done")
_STYLES = {"done": "green", "failed": "red", "stopped": "yellow", "running": "bold", "elsewhere": "cyan"}


class SweepView:
    """Draws how the runs stand; give it to the engine as `watch`.

    Args:
        metrics: tags of what is shown of a run.
        console: where to draw.
        clock: seconds from any origin, monotonic.
    """

    def __init__(
        self,
        metrics: Sequence[str],
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = tuple(metrics)
        self._at_a_time = 1  # the most so far
        self._console = console or Console()
        self._clock = clock
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._statuses: list[Status] = []
        self._began: dict[int, float] = {}
        self._took: list[float] = []
        self._drawn = float("-inf")

    def __enter__(self) -> SweepView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, engine: Engine) -> None:
        """Draw, at most once a second unless something has changed."""
        changed = self._changes(engine)
        now = self._clock()
        if not changed and now - self._drawn < 1:
            return
        self._drawn = now
        if self._live is not None:
            self._live.update(self.table(engine), refresh=True)
            return
        for index in changed:
            if engine.statuses[index] != "waiting":
                self._console.print(self._line(engine, index), highlight=False, soft_wrap=True)

    def table(self, engine: Engine) -> Table:
        """All runs, or those that matter most where there are many."""
        table = Table(caption=self.summary(engine), caption_justify="left")
        table.add_column("run", overflow="fold")
        for column in ("", "step", "tokens/s", "left", *self._metrics):
            table.add_column(column, justify="right")
        order = sorted(range(len(engine.runs)), key=lambda index: _SHOWN.index(engine.statuses[index]))
        for index in sorted(order[:_MOST_ROWS]):
            table.add_row(*self._cells(engine, index))
        if len(order) > _MOST_ROWS:
            rest = Counter(engine.statuses[index] for index in order[_MOST_ROWS:])
            table.add_row(f"and {', '.join(f'{count} {status}' for status, count in rest.items())}")
        return table

    def summary(self, engine: Engine) -> str:
        """How many runs stand how, and about how long the rest will take."""
        counts = Counter(engine.statuses)
        parts = [f"{counts['done']} of {len(engine.runs) + engine.ahead} done"]
        parts += [f"{counts[status]} {status}" for status in _SHOWN if counts[status] and status != "done"]
        left = self._left(engine)
        return ", ".join(parts) + ("" if left is None else f"; about {duration(left)} left")

    def _changes(self, engine: Engine) -> list[int]:
        """The runs whose status has changed; remembers when they began and how long they took."""
        before = self._statuses + ["waiting"] * (len(engine.runs) - len(self._statuses))  # a search adds runs
        changed = [index for index, status in enumerate(engine.statuses) if status != before[index]]
        for index in changed:
            if engine.statuses[index] == "running":
                self._began[index] = self._clock()
            elif before[index] == "running" and engine.statuses[index] == "done":
                self._took.append(self._clock() - self._began[index])
        self._statuses = list(engine.statuses)
        self._at_a_time = max(self._at_a_time, self._statuses.count("running"))
        return changed

    def _left(self, engine: Engine) -> float | None:
        """Seconds until all is done: what is running needs what its own pace says, the rest as long as a run takes."""
        rest, whole = 0.0, list(self._took)
        for index, status in enumerate(engine.statuses):
            if status == "running":
                left = _left(engine.records[index].progress)
                if left is not None:
                    rest += left
                    whole.append(self._clock() - self._began[index] + left)
        waiting = sum(status == "waiting" for status in engine.statuses) + engine.ahead
        if not whole or not (waiting or any(status == "running" for status in engine.statuses)):
            return None
        rest += waiting * sum(whole) / len(whole)
        return rest / min(self._at_a_time, max(1, waiting + engine.statuses.count("running")))

    def _cells(self, engine: Engine, index: int) -> list[Text]:
        status, record = engine.statuses[index], engine.records[index]
        facts = record.metrics if status == "done" else record.progress if status == "running" else {}
        step, steps = facts.get("step", facts.get("steps")), facts.get("steps")
        pace = f"{facts['tokens'] / facts['seconds']:,.0f}" if facts.get("seconds") else ""
        left = _left(facts) if status == "running" else None
        doing = facts.get("doing", "starting") if status == "running" else status
        shown = [
            f"{value:.4f}" if (value := facts.get("metrics", {}).get(tag)) is not None else "" for tag in self._metrics
        ]
        texts = [_name(engine, index), doing, "" if step is None else f"{step:,}/{steps or '?':,}", pace]
        texts += ["" if left is None else duration(left), *shown]
        return [Text(texts[0]), Text(texts[1], style=_STYLES.get(status, "")), *(Text(text) for text in texts[2:])]

    def _line(self, engine: Engine, index: int) -> str:
        status, record = engine.statuses[index], engine.records[index]
        found = record.metrics.get("metrics", {}) if status == "done" else {}
        scores = "".join(f"  {tag} {found[tag]:.4f}" for tag in self._metrics if tag in found)
        why = f"  {engine.reason(index)}" if status in ("pruned", "failed", "stopped") else ""
        return f"{status:9} {_name(engine, index)}{scores}{why}  ({self.summary(engine)})"


def _name(engine: Engine, index: int) -> str:
    run = engine.runs[index]
    return f"{run.cell.name}/seed_{run.seed}"


def _left(progress: dict[str, Any]) -> float | None:
    """Seconds of training that are left, by the pace so far."""
    step, steps, seconds = (progress.get(name) for name in ("step", "steps", "seconds"))
    return (steps - step) * seconds / step if step and steps and seconds else None


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
