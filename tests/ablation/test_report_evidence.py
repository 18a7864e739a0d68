"""Claims: when there is too little to decide, and what it is that decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_runs import recipe, write_run, write_study
from scipy import stats

from hybridvl.ablation.claims import read_claims
from hybridvl.ablation.report.analysis import analyse
from hybridvl.ablation.report.cache import Cache
from hybridvl.ablation.report.cells import Settings
from hybridvl.ablation.report.runs import collect
from hybridvl.ablation.report.verdicts import Finding, Judged

VALUES = {"0": [0.42, 0.40, 0.47], "1/4": [0.61, 0.66, 0.70], "1": [0.60, 0.68, 0.69]}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return write_study(tmp_path / "ratio", VALUES)


def judged(folder: Path, *claims: dict[str, Any]) -> list[Judged]:
    found = read_claims([{"claim": "So it is.", **claim} for claim in claims])
    return list(analyse(collect([folder], Cache()), Settings(), claims=found).claims)


def only(folder: Path, claim: dict[str, Any]) -> Finding:
    ((finding,),) = (judge.findings for judge in judged(folder, claim))
    return finding


def test_too_little_to_decide(study: Path, tmp_path: Path) -> None:
    """Two seeds may be near each other by chance."""
    write_study(tmp_path / "two", {"0": [0.51, 0.5], "1": [0.6, 0.7]})
    claim = {"cell": {"ratio": "0"}, "metric": "test/exact", "above": 0}
    finding = only(tmp_path / "two", claim)
    assert (finding.verdict, finding.basis) == ("undecided", "2 seeds")
    assert finding.reason == "expected at least 3 seeds; 2 of 2 runs are done"
    paired = only(tmp_path / "two", {**claim, "than": {"ratio": "1"}})
    assert (paired.verdict, paired.basis) == ("undecided", "2 pairs of seeds")
    assert paired.reason == (
        "expected at least 3 seeds of both cells; 2 of 2 runs of ratio=0 are done; 2 of 2 runs of ratio=1 are done"
    )
    assert only(study, {**claim, "chance": True}).reason == "how far guessing gets is not known of this metric"


def test_cells_whose_runs_have_failed(study: Path) -> None:
    """They are cells like others, and their claims say what became of the runs."""
    for seed in range(3):
        (study / "ratio=0" / f"seed_{seed}" / "metrics.json").unlink()
        ended = {"status": 1, "signal": None, "reason": "the loss is nan", "ended": "2026-01-01T00:00:00+00:00"}
        (study / "ratio=0" / f"seed_{seed}.ended.json").write_text(json.dumps(ended))
    claim = {"cell": {"ratio": "0"}, "metric": "test/exact", "above": 0}
    alone, paired = judged(study, claim, {**claim, "cell": {"ratio": "1"}, "than": {"ratio": "0"}})
    assert (alone.verdict, paired.verdict) == ("undecided", "undecided")
    assert alone.findings[0].reason == "expected at least 3 seeds; 0 of 3 runs are done, 3 failed"
    assert paired.findings[0].reason.endswith("0 of 3 runs of ratio=0 are done, 3 failed")
    assert paired.findings[0].basis == "0 pairs of seeds"


def test_what_is_decided_by_the_runs_that_are_left_says_so(study: Path) -> None:
    write_run(study / "ratio=0" / "seed_3", recipe(3, {"ratio": "0"}))
    finding = only(study, {"cell": {"ratio": "0"}, "metric": "test/exact", "below": 0.9})
    assert (finding.verdict, finding.basis) == ("supported", "3 seeds of 4 runs: 1 unfinished")
    paired = only(study, {"cell": {"ratio": "0"}, "than": {"ratio": "1"}, "metric": "test/exact", "below": 0})
    assert (paired.verdict, paired.basis) == ("supported", "3 pairs of seeds of 4 and 3 runs: 1 unfinished")


def test_a_metric_that_the_runs_of_the_cell_have_not_logged(study: Path) -> None:
    for seed in range(3):
        write_run(study / "ratio=1" / f"seed_{seed}", recipe(seed, {"ratio": "1"}), {"test/lag_1_exact": 0.5})
    finding = only(study, {"cell": {"ratio": "0"}, "metric": "test/lag_1_exact", "below": 0.9})
    assert finding.reason == "expected at least 3 seeds; 0 of the runs that are done logged it"


def test_seeds_without_spread_decide_nothing(tmp_path: Path) -> None:
    """Of three equal values the spread is not known to be 0."""
    study = write_study(tmp_path / "ratio", {"0": [0.5, 0.5, 0.5], "1": [0.1 + 0.2, 0.3, 0.3], "2": [0.6, 0.7, 0.8]})
    claim = {"metric": "test/exact", "above": 0.1}
    for cell, reason in (({"ratio": "0"}, "no spread: all seeds came to 0.5"), ({"ratio": "1"}, "no spread: all")):
        finding = only(study, {**claim, "cell": cell})
        assert finding.verdict == "undecided"
        assert finding.reason.startswith(reason)
    paired = only(study, {**claim, "cell": {"ratio": "0"}, "than": {"ratio": "1"}})
    assert (paired.verdict, paired.reason) == ("undecided", "no spread: all pairs differ by 0.2")


def probes(folder: Path, values: dict[str, list[float]], trainer: dict[str, Any] | None = None) -> Path:
    """Runs that were tested on 40 questions of frame recall."""
    path = "hybridvl.data.probes.frame_recall.FrameRecall"
    for mixer, shares in values.items():
        for seed, share in enumerate(shares):
            config = recipe(seed, {"mixer": mixer})
            config["data"]["task"] = {"class_path": path, "init_args": {"frames": 4, "test_streams": 40}}
            config["trainer"] = trainer or {}
            write_run(folder / mixer / f"seed_{seed}", config, {"test/exact": share})
    return folder


def test_all_answers_right_in_all_seeds(tmp_path: Path) -> None:
    """Then the answers of one run are the sample: by how many there are it is decided."""
    runs = probes(tmp_path / "runs", {"full": [1.0] * 3, "hybrid": [1.0] * 3, "gdn": [0.2, 0.3, 0.4]})
    low = stats.binomtest(40, 40).proportion_ci(method="exact").low
    claim = {"cell": {"mixer": "full"}, "metric": "test/exact"}
    for bound, verdict in ((0.9, "supported"), (0.95, "undecided")):
        finding = only(runs, {**claim, "above": bound})
        assert (finding.interval.low, finding.interval.high) == (pytest.approx(low), 1.0)
        assert finding.verdict == verdict
    beyond = only(runs, {**claim, "chance": True, "above": 0.8})
    assert (beyond.interval.low, beyond.verdict) == (pytest.approx(low - 0.1), "supported")
    same = only(runs, {**claim, "than": {"mixer": "hybrid"}, "between": [-0.1, 0.1]})
    assert (same.interval.low, same.interval.high) == pytest.approx((low - 1, 1 - low))
    assert same.verdict == "supported"
    other = probes(tmp_path / "limited", {"full": [1.0] * 3}, {"limit_test_batches": 2})
    assert only(other, {**claim, "above": 0.5}).reason == "no spread: all seeds came to 1"
