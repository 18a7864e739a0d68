"""Placements proposed, written and compared: blocks counted by hand, budgets, beams against all sets, scipy's tests."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Collection, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from strange_style import strange_style

from hybridvl.ablation.placement.candidates import (
    Budget,
    Layers,
    candidates,
    kept_within,
    placement_of,
    simple_placements,
)
from hybridvl.ablation.placement.drawing import draw_outcome
from hybridvl.ablation.placement.outcome import compare
from hybridvl.ablation.placement.ranking import LINEAR, best_first, by_beam, by_probe, by_removal, by_scores
from hybridvl.layers.errors import ConfigError
from hybridvl.models.config import ModelConfig
from hybridvl.pattern import parse_pattern
from hybridvl.plan.costs import plan_model

MIXERS = {"full": {"heads": 2, "kv_heads": 1, "head_dim": 16}, "gdn": {"heads": 2, "head_dim": 8}}


class Told:
    """Measures whose scores are told: a cost for each set of layers."""

    def __init__(self, depth: int, samples: int = 5, seed: int = 0, metric: str = "divergence") -> None:
        self.hybrids = SimpleNamespace(layers=tuple(range(depth)))
        self.metric = metric
        draw = random.Random(seed)
        sets = (frozenset(kept) for count in range(depth + 1) for kept in itertools.combinations(range(depth), count))
        self.known = {placement: [draw.uniform(0, 1) for _ in range(samples)] for placement in sets}
        self.asked: set[frozenset[int]] = set()

    def scores(self, placements: Collection[frozenset[int]]) -> dict[frozenset[int], list[float]]:
        self.asked |= set(placements)
        return {placement: self.known[placement] for placement in placements}

    def gain(self, score: float, over: float) -> float:
        return score - over if self.metric == "exact" else over - score

    def mean(self, placement: frozenset[int]) -> float:
        return sum(self.known[placement]) / len(self.known[placement])


def test_simple_placements_are_where_one_would_count_them() -> None:
    patterns = {
        "uniform": "(full gdn*3)*2",
        "uniform-last": "(gdn*3 full)*2",
        "bottom": "full*2 gdn*6",
        "top": "gdn*6 full*2",
    }
    layers = Layers(("gdn",) * 8, "full", tuple(range(8)))
    found = simple_placements(range(8), 2)
    assert {name: layers.pattern(placement) for name, placement in found.items()} == patterns
    assert simple_placements(range(10), 3)["uniform"] == {0, 3, 6}
    assert simple_placements(range(10), 3)["uniform-last"] == {2, 5, 9}
    assert simple_placements((1, 4, 6, 7), 2)["bottom"] == {1, 4}


@given(st.integers(2, 60).flatmap(lambda depth: st.tuples(st.just(depth), st.integers(1, depth - 1))))
def test_simple_placements_have_their_number_and_stand_apart(sizes: tuple[int, int]) -> None:
    depth, count = sizes
    for name, placement in simple_placements(range(depth), count).items():
        assert len(placement) == count
        gaps = [b - a for a, b in itertools.pairwise(sorted(placement))]
        if name.startswith("uniform"):
            assert all(depth // count <= gap <= -(-depth // count) for gap in gaps)


@given(st.lists(st.booleans(), min_size=1, max_size=48), st.sampled_from(["full", "swa(window=64)"]))
def test_a_placement_survives_being_written_in_its_shortest_form(keeps: list[bool], attention: str) -> None:
    layers = Layers(("gdn",) * len(keeps), attention, tuple(range(len(keeps))))
    placement = frozenset(layer for layer, kept in enumerate(keeps) if kept)
    text = layers.pattern(placement)
    parsed = parse_pattern(text)
    assert parsed.layers == [attention if kept else "gdn" for kept in keeps]
    assert len(text) <= len(" ".join(parsed.layers))
    assert placement_of(parsed, layers, len(placement)) == placement


@pytest.mark.parametrize("pattern", ["full gdn*3", "(full gdn)*2 mamba2", "full gdn full(rope=false) gdn*2", "swa*5"])
def test_other_patterns_are_no_placements(pattern: str) -> None:
    layers = Layers(("gdn",) * 5, "full", (0, 1, 2, 3, 4))
    with pytest.raises(ConfigError, match="expected 5 layers of full and gdn"):
        placement_of(parse_pattern(pattern), layers, 2)
    with pytest.raises(ConfigError, match="keeps attention in 1 layers; expected 2"):
        placement_of(parse_pattern("full gdn*4"), layers, 2)
    stays = Layers(("gdn",) * 5, "full", (1, 2, 3, 4))
    with pytest.raises(ConfigError, match="expected 5 layers"):
        placement_of(parse_pattern("full*2 gdn*3"), stays, 2)


def net(pattern: str) -> ModelConfig:
    return ModelConfig(pattern=pattern, width=32, mlp_width=64, vocab_size=512, mixers=MIXERS)


@pytest.mark.parametrize("spare", [0, 1])
def test_a_budget_keeps_as_many_layers_as_fit(spare: int) -> None:
    patterns = ["gdn*6", "full gdn*5", "full*2 gdn*4", "full*3 gdn*3", "full*4 gdn*2", "full*5 gdn", "full*6"]
    plans = [plan_model(net(pattern), (128,), torch.float32) for pattern in patterns]
    used = [plan.state_bytes(128) for plan in plans]
    # Keys and values of one head of 16 in float32, 128 of each, and a counter, against two heads of 8 x 16 and the last
    # four inputs of three convolutions.
    assert {b - a for a, b in itertools.pairwise(used)} == {(2 * 128 * 16 * 4 + 8) - (2 * 8 * 16 * 4 + 64 * 4 * 4)}
    for count in range(1, 6):
        assert kept_within(plans, Budget(used[count] + spare, None, 128, torch.float32)) == count
        assert kept_within(plans, Budget(used[count + 1] - 1 - spare, None, 128, torch.float32)) == count
    for limit, what in ((used[1] - 1, "no layer"), (used[6], "every layer")):
        with pytest.raises(ConfigError, match=rf"{what} can keep attention; .*: {used[1]:,} to {used[5]:,} bytes"):
            kept_within(plans, Budget(limit, None, 128, torch.float32))


def test_a_budget_that_does_not_bound_attention_is_refused() -> None:
    plans = [
        plan_model(net(pattern), (4,), torch.float32) for pattern in ("gdn*3", "full gdn*2", "full*2 gdn", "full*3")
    ]
    assert plans[0].total_params > plans[3].total_params
    budget = Budget(None, plans[1].total_params, 4, torch.float32)
    with pytest.raises(ConfigError, match=rf"attention costs no more .*{plans[3].total_params:,} parameters\)"):
        kept_within(plans, budget)


def test_candidates_carry_the_names_of_all_who_propose_them() -> None:
    first = by_scores("loss", {layer: [float(layer == 1), float(layer == 1)] for layer in range(4)})
    second = by_scores("probe", {layer: [float(layer), float(layer)] for layer in range(4)})
    assert first.order == [1, 0, 2, 3]
    found = candidates([first, second], range(4), 2, {"mine": frozenset((1, 2))})
    assert found == {
        frozenset((0, 1)): ["loss", "bottom"],
        frozenset((2, 3)): ["probe", "top"],
        frozenset((0, 2)): ["uniform"],
        frozenset((1, 3)): ["uniform-last"],
        frozenset((1, 2)): ["mine"],
    }


@given(st.integers(2, 6), st.integers(0, 50), st.sampled_from(["divergence", "exact"]))
def test_a_wide_beam_finds_the_best_set_of_all(depth: int, seed: int, metric: str) -> None:
    told: Any = Told(depth, seed=seed, metric=metric)
    for count in range(1, depth):
        sets = [placement for placement in told.known if len(placement) == count]
        best = (max if metric == "exact" else min)(sets, key=told.mean)
        assert by_beam(told, 100).chosen(count) == best
        assert best_first(told, set(sets))[0] == best
    narrow: Any = Told(depth, seed=seed, metric=metric)
    kept: frozenset[int] = frozenset()
    for _ in range(depth - 1):
        wider = [kept | {layer} for layer in range(depth) if layer not in kept]
        kept = (max if metric == "exact" else min)(wider, key=narrow.mean)
    assert by_beam(narrow, 1).chosen(depth - 1) == kept
    assert len(narrow.asked) == sum(range(2, depth + 1))


@pytest.mark.parametrize("metric", ["cross_entropy", "exact"])
def test_candidates_are_compared_pair_by_pair(metric: str) -> None:
    told: Any = Told(6, samples=40, seed=3, metric=metric)
    layers = Layers(("gdn",) * 6, "full", tuple(range(6)))
    rankings = [by_probe(told), by_removal(told), by_beam(told, 2)]
    proposed = candidates(rankings, range(6), 2, {})
    plans = {kept: plan_model(net(layers.pattern(kept)), (64,), torch.float32) for kept in proposed}
    outcome = compare(told, rankings, proposed, layers, plans, 7)
    means = [told.mean(frozenset(candidate.kept)) for candidate in outcome.candidates]
    assert means == sorted(means, reverse=metric == "exact")
    assert [candidate.score.mean for candidate in outcome.candidates] == pytest.approx(means)
    best = told.known[frozenset(outcome.winner.kept)]
    raw = []
    for candidate in outcome.candidates[1:]:
        scores = told.known[frozenset(candidate.kept)]
        worse: Sequence[float] = [(a - b) * (-1 if metric == "exact" else 1) for a, b in zip(scores, best, strict=True)]
        test = stats.ttest_1samp(worse, 0)
        low, high = test.confidence_interval(0.95)
        assert (candidate.behind.mean, candidate.behind.low, candidate.behind.high) == pytest.approx(
            (sum(worse) / 40, low, high)
        )
        assert candidate.behind.mean > 0
        raw.append(test.pvalue)
    order = sorted(range(len(raw)), key=raw.__getitem__)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, raw[index] * (len(raw) - rank)))
        assert outcome.candidates[1 + index].p == pytest.approx(largest)
    assert math.isnan(outcome.winner.p)
    assert outcome.linear.mean == pytest.approx(told.mean(LINEAR))
    assert outcome.attention.mean == pytest.approx(told.mean(frozenset(range(6))))
    plain = json.loads(json.dumps(outcome.to_dict(), allow_nan=False))
    assert plain["winner"] == outcome.winner.pattern
    assert plain["candidates"][0]["p"] is None
    assert plain["rankings"]["probe"]["keeps"] == sorted(rankings[0].chosen(2))
    assert plain["rankings"]["probe"]["scores"]["3"]["mean"] == pytest.approx(
        told.gain(told.mean(frozenset((3,))), told.mean(LINEAR))
    )
    sets_alone = compare(told, rankings[2:], {rankings[2].chosen(2): ["beam"]}, layers, plans, 7)
    assert len(sets_alone.candidates) == 1
    for drawn in (outcome, sets_alone):
        picture = draw_outcome(drawn)
        assert picture.startswith(b"\x89PNG")
        with strange_style():
            assert draw_outcome(drawn) == picture
