"""Trials of a search: the same as Optuna alone would draw, each cell once, shared, and told, whatever was killed."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial
from search_cases import study_of

from hybridvl.ablation.search.sampling import labels_of
from hybridvl.ablation.search.trials import JOURNAL, Point, Trial, Trials
from hybridvl.ablation.study import Study
from hybridvl.layers.errors import ConfigError

SPACE: dict[str, BaseDistribution] = {
    "lr": FloatDistribution(1e-4, 1e-2, log=True),
    "width": IntDistribution(32, 128, step=16),
    "mixer": CategoricalDistribution(["both", "window", "gdn"]),
}


def _loss(trial: Trial) -> float:
    """Smallest at lr 0.001, width 96 and gdn."""
    labels = trial.labels
    far = abs(np.log10(float(labels["lr"])) + 3) + abs(int(labels["width"]) - 96) / 96
    return float(far + (labels["mixer"] != "gdn"))


def _seed(seed: int, index: int) -> int:
    return int(np.random.SeedSequence([seed, index, 0]).generate_state(1)[0])


def _search(folder: Path, study: Study) -> list[Trial]:
    """All trials, one after another."""
    trials = Trials(study, folder)
    while (trial := trials.ask()) is not None:
        trials.tell(trial, _loss(trial))
    return trials.all()


def _rounded(params: dict[str, float | str], study: Study) -> dict[str, float | str]:
    numbers = {axis.name: axis.range for axis in study.axes if axis.range is not None}
    return {name: numbers[name].nearest(float(params[name])) if name in numbers else params[name] for name in SPACE}


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_trials_are_those_of_optuna_alone(sampler: str, tmp_path: Path) -> None:
    study = study_of(tmp_path, changes={"search.trials": "12", "search.sampler": sampler, "search.seed": "3"})
    found = _search(tmp_path / "runs" / "n", study)
    assert [trial.state for trial in found] == ["complete"] * 12
    for index, trial in enumerate(found):
        seed = _seed(3, index)
        own = optuna.samplers.RandomSampler(seed) if sampler == "random" else None
        reference = optuna.create_study(sampler=own or optuna.samplers.TPESampler(seed=seed, n_startup_trials=5))
        for earlier in found[:index]:
            params = {"lr": float(earlier.labels["lr"]), "width": int(earlier.labels["width"])}
            params = {**params, "mixer": earlier.labels["mixer"]}  # type: ignore[dict-item]
            reference.add_trial(create_trial(value=_loss(earlier), params=params, distributions=SPACE))
        asked = reference.ask(SPACE)
        assert trial.labels == labels_of(_rounded(asked.params, study)), index


def test_it_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    study = study_of(tmp_path, changes={"search.trials": "9", "search.startup": "2"})
    whole = _search(tmp_path / "whole", study)
    folder = tmp_path / "parts"
    for _ in range(9):  # as if the sweep was killed after every trial, and once more before it was told
        trial = Trials(study, folder).ask()
        assert trial is not None
        assert Trials(study, folder).all()[-1] == trial
        Trials(study, folder).tell(trial, _loss(trial))
    assert Trials(study, folder).ask() is None
    assert Trials(study, folder).all() == whole


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.8])
def test_half_a_trial_is_drawn_again(kept: float, tmp_path: Path) -> None:
    """A journal that ends anywhere within the lines of the last trial, or within one of them."""
    study = study_of(tmp_path, changes={"search.sampler": "random"})
    whole = _search(tmp_path / "whole", study)
    folder = tmp_path / "part"
    for _ in range(3):
        before = (folder / JOURNAL).stat().st_size if folder.exists() else 0
        Trials(study, folder).ask()
    content = (folder / JOURNAL).read_bytes()
    (folder / JOURNAL).write_bytes(content[: before + int(kept * (len(content) - before))])
    assert len(Trials(study, folder).all()) == 2
    trials = Trials(study, folder)
    while trials.ask() is not None:
        pass
    assert [trial.labels for trial in trials.all()] == [trial.labels for trial in whole]
    assert all(json.loads(line) for line in (folder / JOURNAL).read_text().splitlines())


def test_a_damaged_journal_is_named(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    folder = tmp_path / "runs"
    Trials(study, folder).ask()
    text = (folder / JOURNAL).read_text()
    (folder / JOURNAL).write_text("{nonsense\n" + text)
    with pytest.raises(ConfigError, match=r"search\.journal: is damaged"):
        Trials(study, folder)


def test_two_at_once_choose_each_cell_once(tmp_path: Path) -> None:
    study = study_of(tmp_path, changes={"search.trials": "16", "search.sampler": "random"})
    alone = {tuple(trial.labels.values()) for trial in _search(tmp_path / "alone", study)}
    found: list[list[Trial]] = [[], []]

    def work(mine: list[Trial]) -> None:
        trials = Trials(study, tmp_path / "shared")
        while (trial := trials.ask()) is not None:
            mine.append(trial)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    both = [tuple(trial.labels.values()) for trial in found[0] + found[1]]
    assert len(both) == len(set(both)) == 16
    assert set(both) == alone
    assert {trial.number for trial in found[0] + found[1]} == set(range(16))


@settings(max_examples=5, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sampler=st.sampled_from(["random", "tpe"]),
    exclude=st.lists(
        st.fixed_dictionaries({}, optional={"a": st.sampled_from("xyz"), "b": st.sampled_from("12")}).filter(bool),
        max_size=2,
    ),
)
def test_a_finite_space_is_used_up(
    tmp_path_factory: pytest.TempPathFactory, seed: int, sampler: str, exclude: list[dict[str, str]]
) -> None:
    """Every cell that is not excluded is a trial once, also those that the sampler would hardly draw."""
    cells = {(a, b, str(c)) for a in "xyz" for b in "12" for c in (1, 2, 3)}
    cells = {cell for cell in cells if not any(e.items() <= {"a": cell[0], "b": cell[1]}.items() for e in exclude)}
    if not cells:
        return
    folder = tmp_path_factory.mktemp("study")
    text = """
name: n
root: ROOT
recipe: base.yaml
axes:
  a: {key: run.a, values: [x, y, z]}
  b: {key: run.b, values: ["1", "2"]}
  c: {key: run.c, range: {low: 1, high: 3}}
search: {trials: COUNT, metric: val/loss, direction: min, startup: 2}
"""
    changes = {"search.seed": str(seed), "search.sampler": sampler, "exclude": json.dumps(exclude)}
    study = study_of(folder, text.replace("COUNT", str(len(cells))), changes)
    trials = Trials(study, None)
    found = []
    while (trial := trials.ask()) is not None:
        found.append(tuple(trial.labels.values()))
        trials.tell(trial, float(trial.labels["c"]))
    assert len(found) == len(cells)
    assert set(found) == cells


def test_a_whole_baseline_is_the_first_trial(tmp_path: Path) -> None:
    first = {"lr": 0.00123456, "width": 48, "mixer": "gdn"}
    study = study_of(tmp_path, changes={"baseline": json.dumps(first)})
    trials = Trials(study, None)
    asked = [trials.ask() for _ in range(2)]
    assert asked[0] is not None
    assert asked[0].labels == {"lr": "0.00123456", "width": "48", "mixer": "gdn"}
    part = Trials(study_of(tmp_path, changes={"baseline": "{mixer: gdn}"}), None)
    assert part.ask() != asked[0]


def _curve(values: list[float], steps: int | None = 40) -> list[Point]:
    return [Point(10 * (number + 1), steps, value) for number, value in enumerate(values)]


def test_the_median_is_optunas(tmp_path: Path) -> None:
    changes = {"search.pruner": "median", "search.startup": "2", "search.sampler": "random"}
    trials = Trials(study_of(tmp_path, changes=changes), tmp_path / "runs")
    curves = [
        [5.0, 4.0, 3.0, 2.0],
        [6.0, 5.0, 4.0, 3.0],
        [5.6, 4.4, 4.1, 1.0],
        [5.4, 4.4, 3.4, 2.4],
        [4.0, 3.0, 9.0, 1.0],
    ]
    reference = optuna.create_study(pruner=optuna.pruners.MedianPruner(n_startup_trials=2))
    ends = []
    for values in curves:
        asked, own = reference.ask(), trials.ask()
        assert own is not None
        expected = None
        for point in _curve(values):
            asked.report(point.value, point.step)
            if point.step < 40 and asked.should_prune():
                expected = point
                break
        reference.tell(asked, state=TrialState.PRUNED) if expected else reference.tell(asked, values[-1])
        found = trials.judge(own, _curve(values[:1]), False) or trials.judge(own, _curve(values), True)
        assert found == expected
        if found is None:
            assert trials.judge(own, _curve([99.0] * 4), True) is None  # it has come through
            trials.tell(own, values[-1])
        ends.append(found.step if found else None)
    assert ends == [None, None, 10, None, None]
    states = [(trial.state, trial.given_up, trial.value) for trial in trials.all()]
    assert states[2] == ("pruned", 10, 5.6)
    assert states[3] == ("complete", None, 2.4)


def test_nothing_is_given_up_at_its_end(tmp_path: Path) -> None:
    trials = Trials(study_of(tmp_path, changes={"search.pruner": "median", "search.startup": "1"}), None)
    first, second, third = trials.ask(), trials.ask(), trials.ask()
    assert first is not None
    assert second is not None
    assert third is not None
    trials.judge(first, _curve([1.0], 10), True)
    trials.tell(first, 1.0)
    assert trials.judge(second, _curve([9.0], 10), True) is None
    assert trials.judge(third, _curve([9.0], None), True) == Point(10, None, 9.0)


def test_successive_halving_is_optunas(tmp_path: Path) -> None:
    """Resources are optimizer steps: from the first validation, at 10, to the last, at 90."""
    changes = {"search.pruner": "hyperband", "search.trials": "40", "search.sampler": "random"}
    trials = Trials(study_of(tmp_path, changes=changes), tmp_path / "runs")
    pruner = optuna.pruners.HyperbandPruner(min_resource=10, max_resource=90, reduction_factor=3)
    reference = optuna.create_study(study_name="search", pruner=pruner)
    draws = np.random.default_rng(0)
    pruned = 0
    for _ in range(40):
        values = list(np.cumsum(draws.normal(size=9)))
        asked, own = reference.ask(), trials.ask()
        assert own is not None
        expected = None
        for point in _curve(values, 90):
            asked.report(point.value, point.step)
            if point.step < 90 and asked.should_prune():
                expected = point.step
                break
        reference.tell(asked, state=TrialState.PRUNED) if expected else reference.tell(asked, values[-1])
        found = trials.judge(own, _curve(values, 90), True)
        assert (found.step if found else None) == expected
        if found is None:
            trials.tell(own, values[-1])
        pruned += found is not None
    assert 10 < pruned < 35


def test_successive_halving_needs_an_end(tmp_path: Path) -> None:
    trials = Trials(study_of(tmp_path, changes={"search.pruner": "hyperband"}), None)
    first = trials.ask()
    assert first is not None
    with pytest.raises(ConfigError, match=r"search.pruner: 'hyperband' deals .*; expected trainer.max_steps, or"):
        trials.judge(first, _curve([1.0], None), False)


def test_reports_are_not_lost_or_doubled_by_kills(tmp_path: Path) -> None:
    study = study_of(tmp_path, changes={"search.pruner": "median", "search.startup": "1"})
    folder = tmp_path / "runs"
    first = Trials(study, folder).ask()
    assert first is not None
    for seen in (1, 2, 2, 4):  # each by another process; a resumed run repeats what it had validated
        Trials(study, folder).judge(first, _curve([3.0, 2.0, 1.5, 1.0][:seen]), seen == 4)
    Trials(study, folder).tell(first, 1.0)
    Trials(study, folder).tell(first, 7.0)  # another sweep, which saw it end, too
    lines = [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]
    assert [line["step"] for line in lines if "intermediate_value" in line] == [10, 20, 30, 40]
    assert Trials(study, folder).all()[0].value == 1.0


def test_optunas_own_tools_read_the_journal(tmp_path: Path) -> None:
    study = study_of(tmp_path, changes={"search.sampler": "random"})
    found = _search(tmp_path / "runs", study)
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "runs" / JOURNAL)))
    shown = optuna.load_study(study_name=None, storage=storage)
    assert [(trial.number, labels_of(trial.params), trial.value) for trial in shown.trials] == [
        (trial.number, trial.labels, trial.value) for trial in found
    ]
    assert shown.best_value == min(_loss(trial) for trial in found)


def test_a_failed_trial_may_yet_come_to_a_value(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    folder = tmp_path / "runs"
    trials = Trials(study, folder)
    first, second = trials.ask(), trials.ask()
    assert first is not None
    assert second is not None
    trials.tell(first, "failed")
    trials.tell(second, 2.0)
    assert [trial.state for trial in trials.all()] == ["failed", "complete"]
    for value in (1.0, 5.0):  # two sweeps have tried it again; the first one to tell counts
        Trials(study, folder).tell(first, value)
    found = trials.all()
    assert [(trial.number, trial.state, trial.value) for trial in found] == [(0, "complete", 1.0), (1, "complete", 2.0)]
    assert found[0].labels == first.labels
    third = trials.ask()
    assert third is not None
    assert len(trials.all()) == 3
    assert third.labels not in [first.labels, second.labels]
