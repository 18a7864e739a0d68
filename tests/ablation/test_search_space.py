"""Ranges, the texts of their numbers, and what a study with a search says and may not say."""

from __future__ import annotations

import math
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from search_cases import STUDY, study_of

from hybridvl.ablation.axes import label_of
from hybridvl.ablation.cells import cell_name, cell_of, cells
from hybridvl.ablation.matching import match_cells
from hybridvl.ablation.ranges import Range, read_range
from hybridvl.ablation.search.sampling import CellSampler
from hybridvl.ablation.search.space import Search, space_size, telling_labels
from hybridvl.ablation.study import combinations
from hybridvl.ablation.study_record import record_study
from hybridvl.layers.errors import ConfigError


@st.composite
def ranges(draw: st.DrawFn) -> Range:
    """Any range that a file may describe."""
    kind = draw(st.sampled_from(["whole", "steps", "log", "whole log", "plain"]))
    if kind.startswith("whole"):
        low = draw(st.integers(1 if "log" in kind else -1000, 1000))
        return Range(low, low + draw(st.integers(1, 5000)), None, "log" in kind)
    if kind == "steps":
        step = draw(st.sampled_from([0.1, 0.25, 0.001, 5.0, 1e-05]))
        low = draw(st.integers(-50, 50)) / 10
        return read_range("r", {"low": low, "high": _high(low, step, draw(st.integers(1, 200))), "step": step})
    low = draw(st.floats(1e-12 if kind == "log" else -1e6, 1e6, allow_subnormal=False))
    high = draw(st.floats(low, 1e7, exclude_min=True, allow_subnormal=False))
    return Range(low, high, None, kind == "log")


def _high(low: float, step: float, count: int) -> float:
    return float(Decimal(repr(low)) + count * Decimal(repr(step)))


@settings(deadline=None)
@given(numbers=ranges(), share=st.floats(0, 1))
def test_a_drawn_number_and_its_text_are_the_same(numbers: Range, share: float) -> None:
    drawn = min(max(numbers.low + share * (numbers.high - numbers.low), numbers.low), numbers.high)
    value = numbers.nearest(drawn)
    assert numbers.low <= value <= numbers.high
    assert numbers.value(label_of(value)) == value
    assert yaml.safe_load(label_of(value)) == value  # what YAML's oldest reader takes for a text is none to others
    assert isinstance(value, int) == numbers.is_whole
    assert numbers.nearest(value) == value
    assert cell_name({"a": label_of(value)}) == f"a={label_of(value)}"  # nothing in it that a folder cannot be called
    if numbers.count is not None:
        assert abs(value - drawn) <= (numbers.step or 1) * 0.5000001
    else:
        size = min(numbers.high - numbers.low, abs(drawn)) if numbers.log else numbers.high - numbers.low
        assert abs(value - drawn) <= size * 1e-3 * 0.51 or value in (numbers.low, numbers.high)


@settings(deadline=None)
@given(numbers=ranges())
def test_the_ends_are_values(numbers: Range) -> None:
    assert list(numbers.ends.values()) == [numbers.low, numbers.high]
    for label, value in numbers.ends.items():
        assert numbers.value(label) == value
        assert numbers.count is None or numbers.nearest(value) == value
    assert read_range("r", numbers.described) == numbers


def test_numbers_are_short() -> None:
    assert Range(1e-4, 1e-2, None, True).nearest(0.00123456789) == 0.001235
    assert Range(0.0, 0.5).nearest(0.123456) == 0.1235
    assert Range(32, 128, 16).nearest(70.0) == 64
    assert Range(0.0, 0.3, 0.1).nearest(0.30000000000000004) == 0.3
    assert [Range(32, 128, 16).count, Range(0.0, 0.3, 0.1).count, Range(1, 9).count] == [7, 4, 9]
    assert Range(0.0, 1.0).count is None


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"low": 1}, "r.high: missing"),
        ({"low": 2, "high": 2}, "r.high: 2; expected more than low"),
        ({"low": 1, "high": "x"}, "r.high: 'x'; expected a number"),
        ({"low": 1, "high": math.inf}, "r.high: inf; expected a number"),
        ({"low": -1e308, "high": 1e308}, "expected more than low"),
        ({"low": True, "high": 2}, "r.low: True"),
        ({"low": 0, "high": 2, "log": True}, "r.low: 0; with log: true, expected more than 0"),
        ({"low": 1, "high": 8, "log": True, "step": 1}, "expected none with log: true"),
        ({"low": 32, "high": 100, "step": 16}, "r.high: 100; expected low and a number of steps, such as 96"),
        ({"low": 1, "high": 8, "step": 0}, "r.step: 0; expected more than 0"),
        ({"low": 1, "high": 2**60}, "expected whole numbers below"),
        ({"low": 1, "high": 8, "max": 1}, "r.max: unknown key"),
        ([1, 2], "r: [1, 2]; expected a mapping"),
    ],
)
def test_mistakes_in_ranges(described: Any, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read_range("r", described)
    assert message in str(raised.value)


def test_what_a_search_says(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    assert study.search == Search(6, "val/loss", "min", "tpe", "none", 0, 5)
    assert study.metrics == ("val/loss",)
    assert study.baseline == {}
    # A first one, then every other label and end of a range.
    assert len(cells(study)) == 1 + 1 + 1 + 2
    cell = cell_of(study, {"lr": "0.0025", "width": "48", "mixer": "gdn"})
    assert cell.name == "lr=0.0025,width=48,mixer=gdn"
    assert cell.overrides == {"model.optimizer.lr": 0.0025, "model.net.mlp_width": 48, "model.net.pattern": "gdn*2"}
    changed = study_of(tmp_path, changes={"search.trials": "9", "axes.lr.range": "{low: 0.001, high: 0.002}"})
    assert changed.search is not None
    assert (changed.search.trials, changed.axes[0].range) == (9, Range(0.001, 0.002))


def test_how_many_cells_there_are(tmp_path: Path) -> None:
    study = study_of(tmp_path, changes={"axes.lr.values": "[0.1, 0.2]", "exclude": "[{mixer: gdn, lr: 0.1}]"})
    assert space_size(study.axes, study.exclude) == (2 * 3 - 1) * 7
    assert space_size(study_of(tmp_path).axes, ()) is None


def test_a_space_too_large_to_be_listed(tmp_path: Path) -> None:
    text = "name: n\nroot: ROOT\nrecipe: base.yaml\naxes:\n" + "".join(
        f"  a{axis}: {{key: model.k{axis}, values: [1, 2, 3, 4, 5]}}\n" for axis in range(12)
    )
    text += "baseline: {a3: 2}\nsearch: {trials: 30, metric: val/loss, direction: min}\n"
    began = time.monotonic()
    study = study_of(tmp_path, text)
    found = cells(study)
    assert len(found) == 1 + 12 * 4
    assert len({pair for cell in found for pair in cell.labels.items()}) == 12 * 5
    assert all(sum(cell.labels[name] != found[0].labels[name] for name in cell.labels) == 1 for cell in found[1:])
    assert found[0].labels["a3"] == "2"
    assert space_size(study.axes, ()) == 5**12
    assert space_size(study.axes, [{"a0": "1", "a1": "1"}]) == 24 * 5**10
    assert space_size(study.axes, [{f"a{axis}": "1" for axis in range(12)}]) is None
    sampler = CellSampler(study.search, study.axes, (), 3, set(), None)
    storage = optuna.create_study()
    other = next(sampler._others(storage, storage.ask()))
    assert other.keys() == {f"a{axis}" for axis in range(12)}
    assert time.monotonic() - began < 5


@settings(deadline=None)
@given(st.data())
def test_telling_cells_have_every_label_that_is_possible(data: st.DataObject) -> None:
    labels = {name: ["x", "y", "z"][: data.draw(st.integers(1, 3))] for name in "abc"}
    entries = st.lists(st.sampled_from("abc"), min_size=1, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: st.sampled_from(labels[name]) for name in names})
    )
    exclude = data.draw(st.lists(entries, max_size=5))
    baseline = data.draw(st.one_of(st.just({}), entries))
    every = combinations(labels, exclude)
    found = telling_labels(labels, exclude, baseline)
    assert bool(found) == any(baseline.items() <= cell.items() for cell in every)
    assert all(cell in every for cell in found)
    if found:
        assert baseline.items() <= found[0].items()
        possible = {pair for cell in every for pair in cell.items()}
        assert {pair for cell in found for pair in cell.items()} == possible
        assert len(found) <= 1 + len(possible)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("search: {trials: 6", "x: {trials: 6", "unknown key"),
        (
            "\nsearch: {trials: 6, metric: val/loss, direction: min}",
            "",
            "axes.lr.range: numbers are drawn",
        ),
        ("val/loss", "test/exact", "search.metric: 'test/exact'; expected the tag of a metric of the validation"),
        ("metric: val/loss, ", "", "search.metric: None"),
        ("direction: min", "direction: up", "search.direction: 'up'; expected one of max, min"),
        ("direction: min", "direction: min, sampler: grid", "search.sampler: 'grid'; expected one of random, tpe"),
        ("direction: min", "direction: min, pruner: all", "search.pruner: 'all'; expected one of none, median, hyperb"),
        ("trials: 6", "trials: 0", "search.trials: 0; expected a whole number of at least 1"),
        ("trials: 6", "trails: 6", "search.trails: unknown key, did you mean 'trials'?"),
        ("search:", "claims: [{claim: c}]\nsearch:", "claims"),
        ("search:", "match: params\nsearch:", "match: a search has no first cell to match with; expected `baseline`"),
        ("search:", "exclude: [{lr: 0.001}]\nsearch:", "exclude[0].lr: the axis has a range"),
        ("search:", "baseline: {lr: 0.1}\nsearch:", "baseline.lr: '0.1' is no value of the range"),
        ("search:", "baseline: {width: 40}\nsearch:", "baseline.width: '40' is no value of the range"),
        ("search:", "baseline: {mixer: gdn}\nexclude: [{mixer: gdn}]\nsearch:", "baseline: is excluded"),
        ("range: {low: 32", "values: [1], range: {low: 32", "axes.width.range: the axis has values, too"),
        ("key: model.net.mlp_width, ", "", "axes.width.key: missing; expected the path that the numbers are for"),
    ],
)
def test_mistakes_in_searches(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in STUDY
    with pytest.raises(ConfigError) as raised:
        study_of(tmp_path, STUDY.replace(old, new))
    assert message in str(raised.value)


def test_more_trials_than_cells(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"search.trials: 6; the axes have 3 cells; expected at most as many, or no"):
        study_of(tmp_path, "\n".join(line for line in STUDY.splitlines() if "range" not in line))


def test_trials_are_matched_with_a_cell_that_need_not_be_a_trial(tmp_path: Path) -> None:
    text = STUDY.replace("{key: model.net.mlp_width", "{key: model.net.vocab_size").replace("high: 128", "high: 144")
    study = study_of(tmp_path, text.replace("search:", "baseline: {mixer: window}\nmatch: params\nsearch:"))
    cell, own = (cell_of(study, {"lr": "0.001", "width": "48", "mixer": mixer}) for mixer in ("gdn", "window"))
    matched, same = match_cells(study, [cell, own])
    assert matched.costs is not None
    assert same.costs is not None
    assert same.solved == {}
    assert matched.solved != {}
    assert abs(matched.costs.params / same.costs.params - 1) <= 0.005


def test_a_folder_holds_one_search(tmp_path: Path) -> None:
    path = record_study(study_of(tmp_path))
    written = yaml.safe_load(path.read_text())
    assert written["search"]["trials"] == 6
    assert written["axes"]["width"] == {"key": "model.net.mlp_width", "range": {"low": 32, "high": 128, "step": 16}}
    for change, message in (
        ({"search.seed": "1"}, "search.seed: 0, now 1"),
        ({"search.metric": "val/exact"}, "search.metric: 'val/loss', now 'val/exact'"),
        ({"search.trials": "5"}, "search.trials: 6, now 5"),
        ({"axes.width.range": "{low: 32, high: 64, step: 16}"}, "axes.width.range"),
        ({"axes.mixer.values": "{both: swa gdn, window: swa*2, gdn: gdn*2, more: gdn swa}"}, "axes.mixer.values"),
        ({"exclude": "[{mixer: gdn}]"}, "exclude"),
    ):
        with pytest.raises(ConfigError) as raised:
            record_study(study_of(tmp_path, changes=change), extend=True)
        assert message in str(raised.value)
        assert "--extend adds trials and seeds" in str(raised.value)
    more = study_of(tmp_path, changes={"search.trials": "8"})
    with pytest.raises(ConfigError, match=r"search.trials: 6, now 8; expected the same, or --extend to add trials"):
        record_study(more)
    record_study(more, extend=True)
    record_study(more)
    grid = "\n".join(line for line in STUDY.splitlines() if "range" not in line and "search" not in line)
    with pytest.raises(ConfigError, match="made with another study"):
        record_study(study_of(tmp_path, grid), extend=True)
