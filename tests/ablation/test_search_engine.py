"""The engine of a search with quick fits: what is run, given up and told, also by several, after kills and failures."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import threading
import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from search_cases import STEPS, STUDY, loss, study_of, use_quick_fits

from hybridvl.ablation.engine import Work
from hybridvl.ablation.local import Slot
from hybridvl.ablation.records import RunRecord
from hybridvl.ablation.search.engine import SearchEngine, SearchOnlooker
from hybridvl.ablation.search.trials import Trial, Trials
from hybridvl.ablation.study import Study
from hybridvl.layers.errors import ConfigError

LR_ONLY = "\n".join(line for line in STUDY.splitlines() if "mlp_width" not in line and "pattern" not in line)

MATCHED = """
name: n
root: ROOT
recipe: base.yaml
overrides: {model.optimizer.lr: 0.001, model.net.mixers.swa.heads: 4}
axes: {kv: {key: model.net.mixers.swa.kv_heads, range: {low: 1, high: 4}}}
baseline: {kv: 1}
match: params
search: {trials: 4, metric: val/loss, direction: min, sampler: random}
seeds: [0, 1]
"""


@pytest.fixture(autouse=True)
def _quick_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_quick_fits(tmp_path, monkeypatch)


def _study(folder: Path, name: str = "n", **changes: str) -> Study:
    given = {"seeds": "[0, 1]", "search.sampler": "random", "name": name}
    return study_of(folder, LR_ONLY, {**given, **{f"search.{key}": value for key, value in changes.items()}})


def _run(study: Study, places: int = 1, retry_failed: bool = False) -> SearchEngine:
    work = Work([], study.folder, retry_failed)
    engine = SearchEngine(study, work, [Slot((0,), bound=False)] * places)
    engine.run()
    return engine


def _trials(study: Study) -> list[Trial]:
    return Trials(study, study.folder).all()


def _starts(study: Study) -> dict[str, int]:
    """How often each run was started, by its cell and seed."""
    found = sorted(study.folder.glob("*/seed_?.json"))
    return {f"{path.parent.name}/{path.stem}": json.loads(path.read_text())["attempts"] for path in found}


def _expected(labels: list[str], startup: int) -> list[tuple[str, float | None]]:
    """How trials end, one after another, by Optuna alone."""
    reference = optuna.create_study(pruner=optuna.pruners.MedianPruner(n_startup_trials=startup))
    ends: list[tuple[str, float | None]] = []
    for lr in labels:
        trial = reference.ask()
        for step in STEPS:
            trial.report(loss(lr, step), step)
            if step < STEPS[-1] and trial.should_prune():
                reference.tell(trial, state=TrialState.PRUNED)
                ends.append(("pruned", loss(lr, step)))
                break
        else:
            reference.tell(trial, loss(lr))
            ends.append(("complete", (loss(lr) + loss(lr, seed=1)) / 2))
    return ends


def test_a_search_by_one_run_at_a_time(tmp_path: Path) -> None:
    first, second = (_study(tmp_path, name, trials="8", pruner="median", startup="2") for name in ("one", "two"))
    engine = _run(first)
    found = _trials(first)
    expected = _expected([trial.labels["lr"] for trial in found], 2)
    assert [trial.state for trial in found] == [state for state, _ in expected]
    assert [trial.value for trial in found] == pytest.approx([value for _, value in expected])
    states = [trial.state for trial in found]
    assert 0 < states.count("pruned") < 6
    # What was given up is not run with the second seed; nothing is started twice.
    runs = {f"lr={trial.labels['lr']}/seed_{seed}" for trial in found for seed in (0, 1) if trial.state == "complete"}
    runs |= {f"lr={trial.labels['lr']}/seed_0" for trial in found}
    assert _starts(first) == dict.fromkeys(sorted(runs), 1)
    assert sorted(engine.statuses) == ["done"] * 2 * states.count("complete") + ["pruned"] * states.count("pruned")
    assert engine.ahead == 0
    pruned = RunRecord(first.folder / f"lr={found[states.index('pruned')].labels['lr']}" / "seed_0")
    assert pruned.state == "pruned"
    assert pruned.reason.startswith("at step 10, with val/loss ")
    # The same again, elsewhere; and nothing at all where all is done.
    _run(second)
    assert _trials(second) == found
    assert sorted(_run(first).statuses) == sorted(engine.statuses)
    assert _starts(first) == dict.fromkeys(sorted(runs), 1)


def test_two_sweeps_share_a_search(tmp_path: Path) -> None:
    alone, shared = _study(tmp_path, "alone", trials="10"), _study(tmp_path, "shared", trials="10")
    _run(alone, places=2)
    threads = [threading.Thread(target=_run, args=(shared,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [trial.state for trial in _trials(shared)] == ["complete"] * 10
    assert _trials(shared) == _trials(alone)
    assert _starts(shared) == _starts(alone)
    assert set(_starts(shared).values()) == {1}
    assert len(_starts(shared)) == 20


def test_killed_sweeps_lose_and_double_nothing(tmp_path: Path) -> None:
    alone, killed = _study(tmp_path, "alone", trials="6"), _study(tmp_path, "killed", trials="6")
    _run(alone, places=2)
    draws = random.Random(0)
    context = multiprocessing.get_context("fork")
    for _ in range(6):
        process = context.Process(target=_run, args=(killed, 2))
        process.start()
        process.join(draws.uniform(0.1, 0.9))
        process.kill()
        process.join()
    _run(killed, places=2)
    assert _trials(killed) == _trials(alone)
    assert _starts(killed).keys() == _starts(alone).keys()
    for name in _starts(killed):
        log = (killed.folder / name).with_name(f"{Path(name).name}.log").read_text()
        assert log.count("through") == 1, name


def test_a_signal_stops_and_the_next_sweep_goes_on(tmp_path: Path) -> None:
    study = _study(tmp_path, trials="4")
    engine = SearchEngine(study, Work([], study.folder), [Slot((0,), bound=False)])
    timer = threading.Timer(0.3, lambda: signal.raise_signal(signal.SIGTERM))
    began = time.monotonic()
    handler = signal.getsignal(signal.SIGTERM)
    timer.start()
    engine.run()
    assert time.monotonic() - began < 30
    assert signal.getsignal(signal.SIGTERM) == handler
    assert engine.signal == signal.SIGTERM
    assert len(_trials(study)) < 4
    _run(study)
    assert [trial.state for trial in _trials(study)] == ["complete"] * 4


def test_a_trial_that_was_judged_but_not_marked(tmp_path: Path) -> None:
    """As if the sweep had been killed between the two: the run is not gone on with."""
    study = _study(tmp_path, trials="5", pruner="median", startup="1")
    _run(study)
    before = _trials(study)
    marks = list(study.folder.glob("*/seed_0.pruned.json"))
    assert marks
    for mark in marks:
        mark.unlink()
    engine = _run(study)
    assert engine.statuses.count("pruned") == len(marks)
    assert all(mark.exists() for mark in marks)
    assert _trials(study) == before
    assert set(_starts(study).values()) == {1}


def test_failed_trials_can_be_tried_again(tmp_path: Path) -> None:
    study = _study(tmp_path, trials="5")
    Path("broken").touch()
    engine = _run(study, places=2)
    found = _trials(study)
    failed = [trial for trial in found if float(trial.labels["lr"]) > 0.002]
    assert 0 < len(failed) < 5
    assert [trial for trial in found if trial.state == "failed"] == failed
    assert engine.statuses.count("failed") == len(failed)
    assert _run(study).statuses.count("failed") == len(failed)
    assert set(_starts(study).values()) == {1}
    Path("broken").unlink()
    _run(study, retry_failed=True)
    again = _trials(study)
    assert [trial.labels for trial in again] == [trial.labels for trial in found]
    for trial in again:
        lr = trial.labels["lr"]
        assert trial.state == "complete"
        assert trial.value == pytest.approx((loss(lr) + loss(lr, seed=1)) / 2)
    assert set(_starts(study).values()) == {1, 2}


def test_more_trials_and_seeds_later(tmp_path: Path) -> None:
    _run(_study(tmp_path, trials="3"))
    more = study_of(
        tmp_path, LR_ONLY, {"seeds": "[0, 1, 2]", "search.sampler": "random", "search.trials": "4", "name": "n"}
    )
    _run(more)
    found = _trials(more)
    assert len(found) == 4
    assert len(_starts(more)) == 12
    for trial, seeds in zip(found, [2, 2, 2, 3], strict=True):
        lr = trial.labels["lr"]
        assert trial.value == pytest.approx(sum(loss(lr, seed=seed) for seed in range(seeds)) / seeds)


def test_a_metric_that_is_not_logged_stops_the_sweep(tmp_path: Path) -> None:
    study = _study(tmp_path, metric="val/exat")
    with pytest.raises(ConfigError, match=r"search.metric: 'val/exat' was not logged by .*; it logged val/loss;"):
        _run(study, places=2)
    assert len(_starts(study)) <= 3
    assert {trial.state for trial in _trials(study)} == {"running"}


def test_a_trial_that_cannot_be_matched_fails_alone(tmp_path: Path) -> None:
    study = study_of(tmp_path, MATCHED)
    for _ in range(2):  # also where it is known already
        engine = _run(study, places=2)
        ends = {trial.labels["kv"]: trial.state for trial in _trials(study)}
        assert ends == {"1": "complete", "2": "complete", "3": "failed", "4": "complete"}
        assert (engine.statuses, engine.ahead) == (["done"] * 6, 0)
        (trouble,) = engine.troubles
        assert "cell kv=3: " in trouble
        assert "expected a divisor of heads = 4" in trouble
    onlooker = SearchOnlooker(study, Work([], study.folder), study.folder / ".slurm")
    assert (onlooker.statuses, onlooker.ahead, onlooker.troubles) == (["done"] * 6, 0, engine.troubles)


def test_who_looks_on_counts_by_how_runs_stand_now(tmp_path: Path) -> None:
    study = _study(tmp_path, trials="5")
    study.folder.mkdir(parents=True)
    onlooker = SearchOnlooker(study, Work([], study.folder), study.folder / ".slurm")
    assert onlooker.ahead == 10
    Path("broken").touch()
    failed = _run(study).statuses.count("failed")
    assert failed > 0
    onlooker.follow(lambda: False)
    assert onlooker.statuses.count("failed") == failed
    assert onlooker.statuses.count("done") == 2 * (5 - failed)
    assert onlooker.ahead == 0
    # Nobody is asked to do what has failed, unless that is wanted; those who are choose the runs themselves.
    for retry_failed in (False, True):
        work = Work([], study.folder, retry_failed)
        again = SearchOnlooker(study, work, study.folder / ".slurm")
        assert len(again.left) + again.ahead == (2 * failed if retry_failed else 0)
        assert again.share.runs == ()


def test_once_there_is_no_more_to_choose_nobody_asks_all_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    ask = Trials.ask

    def counted(self: Trials) -> Trial | None:
        found = ask(self)
        asked.append(found is None)
        return found

    monkeypatch.setattr(Trials, "ask", counted)
    looks: list[float] = []
    everything = Trials.all
    monkeypatch.setattr(Trials, "all", lambda self: looks.append(0.0) or everything(self))
    monkeypatch.setenv("SLOW", "0.3")
    _run(_study(tmp_path, trials="2"), places=5)
    assert 1 <= sum(asked) <= len(looks)
    assert asked.count(False) == 2
