"""Intervals, paired tests, Holm's correction and Pareto fronts against scipy and against their definitions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hybridvl.ablation.statistics import holm, mean_interval, paired_difference, pareto_front, share_interval

# Student's sleep data: extra hours of sleep of ten patients with each of two drugs.
FIRST = (0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0)
SECOND = (1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4)

scores = st.lists(st.floats(-1e3, 1e3).map(lambda x: round(x, 6)), min_size=2, max_size=12)


def by_seed(values: tuple[float, ...] | list[float]) -> dict[int, float]:
    return dict(enumerate(values))


def test_student_s_own_example() -> None:
    """The figures printed in textbooks for these data."""
    found = paired_difference(by_seed(SECOND), by_seed(FIRST))
    assert found.interval.mean == pytest.approx(1.58)
    assert (found.interval.low, found.interval.high) == pytest.approx((0.7001, 2.4599), abs=1e-4)
    assert found.p == pytest.approx(0.002833, abs=1e-6)
    assert found.pairs == tuple(range(10))


@given(scores, st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_the_t_interval_is_scipy_s(values: list[float], level: float) -> None:
    found = mean_interval(values, "t", level)
    assert found.count == len(values)
    assert found.deviation == pytest.approx(np.std(values, ddof=1), rel=1e-9, abs=1e-12)
    if found.deviation == 0:
        assert found.low == found.mean == found.high
        return
    expected = stats.t.interval(level, len(values) - 1, np.mean(values), stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(scores, st.data())
def test_the_paired_test_is_scipy_s(values: list[float], data: st.DataObject) -> None:
    shift = data.draw(st.lists(st.floats(0.01, 10), min_size=len(values), max_size=len(values), unique=True))
    other = [a + b for a, b in zip(values, shift, strict=True)]
    found = paired_difference(by_seed(other), by_seed(values))
    if found.interval.deviation < 1e-9 * max(1, abs(found.interval.mean)):
        return  # differences that are equal but for rounding
    expected = stats.ttest_rel(other, values)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-6)
    interval = expected.confidence_interval(0.95)
    assert (found.interval.low, found.interval.high) == pytest.approx((interval.low, interval.high), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("values", [FIRST, SECOND, (0.2, 0.25, 0.9)])
def test_the_bootstrap_is_scipy_s_percentile_method(values: tuple[float, ...]) -> None:
    found = mean_interval(values, "bootstrap")
    rng = np.random.default_rng(7)
    settings = {"method": "percentile", "n_resamples": 200_000, "batch": 20_000, "rng": rng}
    interval = stats.bootstrap((values,), np.mean, confidence_level=0.95, **settings).confidence_interval
    # What 10,000 resamples leave to chance: four standard errors of a 2.5 % quantile.
    spread = np.std(values) / math.sqrt(len(values))
    tolerance = 4 * spread * math.sqrt(0.025 * 0.975 / 10_000) / stats.norm.pdf(1.96)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=max(tolerance, 0.05 * spread))
    assert found == mean_interval(values, "bootstrap")


@given(st.lists(st.integers(-5, 5), min_size=2, max_size=7))
@settings(max_examples=40, deadline=None)
def test_the_sign_flip_test_is_scipy_s_permutation_test(differences: list[int]) -> None:
    found = paired_difference(by_seed([float(d) for d in differences]), dict.fromkeys(range(len(differences)), 0.0))
    flipped = paired_difference(
        by_seed([float(d) for d in differences]), dict.fromkeys(range(len(differences)), 0.0), "bootstrap"
    )
    sample = (np.asarray(differences, float), np.zeros(len(differences)))
    expected = stats.permutation_test(
        sample, lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples", vectorized=True
    )
    if sum(differences) == 0:  # both tails are all assignments
        assert flipped.p == 1.0
    else:
        assert flipped.p == pytest.approx(min(1.0, expected.pvalue))
    assert found.differences == flipped.differences


def test_the_sign_flip_test_of_many_pairs_agrees_with_the_exact_one() -> None:
    rng = np.random.default_rng(3)
    differences = rng.normal(0.25, 1.0, 30)
    found = paired_difference(by_seed(list(differences)), dict.fromkeys(range(30), 0.0), "bootstrap")
    assert found.p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.02)


def test_the_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = [(i := mean_interval(rng.normal(3.0, 2.0, 4))).low <= 3.0 <= i.high for _ in range(4000)]
    assert np.mean(covered) == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 4000))


def test_seeds_are_paired_by_number() -> None:
    found = paired_difference({0: 1.0, 2: 5.0, 7: 2.0}, {2: 4.0, 0: 0.5, 9: 1.0})
    assert found.pairs == (0, 2)
    assert found.differences == (0.5, 1.0)


def test_too_few_values_have_no_interval() -> None:
    one, none = mean_interval([0.5]), mean_interval([])
    assert (one.mean, one.count) == (0.5, 1)
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert math.isnan(none.mean)
    assert none.count == 0
    assert math.isnan(paired_difference({0: 1.0}, {0: 0.5}).p)


def test_differences_without_spread() -> None:
    """They have no t; that signs are all the same is something all the same."""
    zeros = dict.fromkeys(range(3), 0.0)
    for other, flipped in ((zeros, 1.0), (dict.fromkeys(range(3), 0.5), 0.25)):
        found = paired_difference(other, zeros)
        assert math.isnan(found.p)
        assert found.interval.low == found.interval.mean == found.interval.high == other[0]
        assert paired_difference(other, zeros, "bootstrap").p == flipped


def test_differences_that_differ_by_rounding_have_no_spread() -> None:
    """0.3 - 0.2, 0.4 - 0.3 and 0.9 - 0.8 are three numbers in floats, and three times 0.1."""
    found = paired_difference({0: 0.3, 1: 0.4, 2: 0.9}, {0: 0.2, 1: 0.3, 2: 0.8})
    assert len(set(found.differences)) > 1
    assert found.interval.deviation == 0.0
    assert math.isnan(found.p)
    nothing = paired_difference({0: 0.1 + 0.2, 1: 0.5, 2: 0.7}, {0: 0.3, 1: 0.5, 2: 0.7})
    assert nothing.differences == (0.0, 0.0, 0.0)
    assert paired_difference({0: 0.1 + 0.2, 1: 0.5}, {0: 0.3, 1: 0.5}, "bootstrap").p == 1.0


@given(st.integers(1, 400), st.data(), st.sampled_from([0.9, 0.95]))
def test_the_interval_of_a_share_is_scipy_s_exact_one(count: int, data: st.DataObject, level: float) -> None:
    right = data.draw(st.integers(0, count))
    found = share_interval(right / count, count, level)
    expected = stats.binomtest(right, count).proportion_ci(level, method="exact")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert found.mean == right / count


p_values = st.lists(st.floats(0, 1), min_size=1, max_size=6)


@given(p_values)
def test_holm_is_the_closed_test_of_bonferroni(found: list[float]) -> None:
    """A hypothesis falls at alpha iff every set of hypotheses that holds it falls by Bonferroni at alpha."""
    indices = range(len(found))
    expected = []
    for index in indices:
        subsets = [s for n in indices for s in itertools.combinations(indices, n + 1) if index in s]
        expected.append(max(min(1.0, len(subset) * min(found[i] for i in subset)) for subset in subsets))
    assert holm(found) == pytest.approx(expected)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    with_missing = holm([math.nan, 0.01, 0.04])
    assert math.isnan(with_missing[0])
    assert with_missing[1:] == pytest.approx([0.02, 0.04])
    assert holm([]) == []


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_the_front_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    front = pareto_front([cost for cost, _ in points], [quality for _, quality in points])
    expected = {
        index
        for index, (cost, quality) in enumerate(points)
        if not any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in points)
    }
    assert set(front) == expected
    assert len(front) == len(set(front))
    assert [points[index][0] for index in front] == sorted(points[index][0] for index in front)


def test_points_that_are_not_finite_are_not_on_the_front() -> None:
    assert pareto_front([1.0, math.nan, 2.0, 0.5], [0.5, 0.9, 0.6, math.nan]) == [0, 2]
