"""benchmarks/report.py: the study that it writes is one that a report can say something about."""

from __future__ import annotations

import random
from pathlib import Path
from types import ModuleType

import pytest
from scripts import load_script

from hybridvl.ablation.report.analysis import analyse
from hybridvl.ablation.report.cache import Cache
from hybridvl.ablation.report.cells import Settings
from hybridvl.ablation.report.runs import collect


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("report")


def test_the_study_that_is_timed(script: ModuleType, tmp_path: Path) -> None:
    """Every run is done, has curves and slices, and its model is known."""
    script.write_study(tmp_path / "study", runs=7, seeds=3)
    analysis = analyse(collect([tmp_path / "study"], Cache()), Settings())
    assert analysis.statuses == {"done": 7}
    assert sorted(len(cell.runs) for cell in analysis.cells) == [1, 3, 3]
    assert analysis.warnings == []
    assert analysis.metrics == ["test/exact"]
    assert {cost.state_bytes is None for cost in analysis.costs} == {False}
    (curve,) = {tuple(run.curves["train/loss"].steps) for run in analysis.runs}
    assert curve == tuple(range(10, script.STEPS + 1, 10))
    assert all(f"test/lag_{lag}_exact" in run.metrics for run in analysis.runs for lag in script.LAGS)


def test_event_files_are_as_long_as_those_of_a_fit(script: ModuleType) -> None:
    """A fit of 560 steps on pages of digits leaves about a hundred thousand bytes, pictures aside some forty."""
    assert 30_000 < len(script._events(random.Random(0))) < 120_000
