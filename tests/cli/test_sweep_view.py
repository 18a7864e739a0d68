"""How a sweep shows its runs: a table on a terminal, lines in a log."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from hybridvl.ablation.cells import Cell, Run
from hybridvl.ablation.engine import Engine, Work
from hybridvl.cli.sweep_view import SweepView


def _write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _engine(folder: Path, count: int = 4) -> Engine:
    cells = [Cell({"a": str(number)}, {}, f"a={number}") for number in range(count)]
    return Engine(Work([Run(cell, 0, folder / cell.name / "seed_0", [], "key") for cell in cells], folder))


def test_the_table_has_paces_times_and_scores(tmp_path: Path) -> None:
    now = [100.0]
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    view = SweepView(["val/exact"], console, lambda: now[0])
    engine = _engine(tmp_path)
    engine.statuses = ["running", "running", "waiting", "failed"]
    view(engine)
    now[0] = 160.0
    _write(engine.runs[0].folder / "metrics.json", {"steps": 300, "tokens": 9000, "seconds": 50, "metrics": {}})
    progress = {"doing": "train", "step": 100, "steps": 300, "tokens": 3000, "seconds": 60.0}
    _write(engine.runs[1].folder / "progress.json", {**progress, "metrics": {"val/exact": 0.25}})
    engine.statuses = ["done", "running", "waiting", "failed"]
    view(engine)
    # The one that is running needs 120 s more, 180 in all; one is waiting, and runs take (60 + 180) / 2 s.
    assert view.summary(engine) == "1 of 4 done, 1 running, 1 failed, 1 waiting; about 2 min 00 s left"
    rows = list(zip(*(column._cells for column in view.table(engine).columns), strict=True))
    shown = [[str(cell) for cell in row] for row in rows]
    assert shown == [
        ["a=0/seed_0", "done", "300/300", "180", "", ""],
        ["a=1/seed_0", "train", "100/300", "50", "2 min 00 s", "0.2500"],
        ["a=2/seed_0", "waiting", "", "", "", ""],
        ["a=3/seed_0", "failed", "", "", "", ""],
    ]


def test_many_runs_show_those_that_matter(tmp_path: Path) -> None:
    view = SweepView([], Console(file=io.StringIO(), force_terminal=True))
    engine = _engine(tmp_path, 100)
    engine.statuses = ["done"] * 90 + ["failed"] * 2 + ["running"] * 2 + ["waiting"] * 6
    table = view.table(engine)
    names = [str(cell) for cell in table.columns[0]._cells]
    assert names[-1] == "and 60 done"
    assert {f"a={number}/seed_0" for number in range(90, 100)} < set(names)


def test_a_log_has_a_line_for_every_change(tmp_path: Path) -> None:
    out = io.StringIO()
    view = SweepView(["val/exact"], Console(file=out, width=200))
    engine = _engine(tmp_path, 2)
    for statuses in (["running", "waiting"], ["running", "waiting"], ["failed", "waiting"]):
        engine.statuses = statuses  # type: ignore[assignment]
        if statuses[0] == "failed":
            _write(engine.records[0].ended, {"reason": "it broke"})
        view(engine)
    lines = out.getvalue().splitlines()
    assert lines[0] == "running   a=0/seed_0  (0 of 2 done, 1 running, 1 waiting)"
    assert lines[1] == "failed    a=0/seed_0  it broke  (0 of 2 done, 1 failed, 1 waiting)"
    assert len(lines) == 2
