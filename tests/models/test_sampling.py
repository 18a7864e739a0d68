"""Penalty, temperature, top-k and top-p against transformers' processors, and the frequencies of what is drawn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridvl.layers import ConfigError
from hybridvl.models.sampling import (
    LEAST_TEMPERATURE,
    MOST_PENALTY,
    Sampler,
    Sampling,
    keep_top_k,
    keep_top_p,
    penalize,
    seen_tokens,
)

CPU = torch.device("cpu")


def random_logits(seed: int, rows: int, vocab: int, spread: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Rounded, so that equal logits occur.
    return (torch.randn(rows, vocab, generator=generator) * spread * 8).round() / 8


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 3),
    vocab=st.integers(2, 300),
    spread=st.floats(0.2, 8),
    penalty=st.floats(0.3, 3),
    top_k=st.integers(1, 310),
    top_p=st.floats(0.01, 0.999),
)
@settings(max_examples=150, deadline=None)
def test_each_step_as_in_transformers(
    seed: int, rows: int, vocab: int, spread: float, penalty: float, top_k: int, top_p: float
) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

    logits = random_logits(seed, rows, vocab, spread)
    ids = torch.randint(0, vocab, (rows, 12), generator=torch.Generator().manual_seed(seed))
    found = penalize(logits, seen_tokens(ids, None, vocab), penalty)
    assert torch.equal(found, RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone()))
    assert torch.equal(keep_top_k(logits, min(top_k, vocab)), TopKLogitsWarper(top_k)(ids, logits))
    assert torch.equal(keep_top_p(logits, top_p), TopPLogitsWarper(top_p)(ids, logits))


@given(seed=st.integers(0, 2**31), temperature=st.floats(0.1, 3), top_k=st.integers(0, 60), top_p=st.floats(0.1, 1))
@settings(max_examples=60, deadline=None)
def test_all_steps_together_as_in_transformers(seed: int, temperature: float, top_k: int, top_p: float) -> None:
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits, ids = (
        random_logits(seed, 2, 50, 3.0),
        torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(seed)),
    )
    theirs = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.7), TemperatureLogitsWarper(temperature)])
    if top_k:
        theirs.append(TopKLogitsWarper(top_k))
    if top_p < 1:  # as transformers' own generation does
        theirs.append(TopPLogitsWarper(top_p))
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=1.7)
    sampler = Sampler(sampling, seen_tokens(ids, None, 50), CPU)
    assert torch.equal(sampler.scores(logits), theirs(ids, logits.clone()))
    more = torch.tensor([3, 44])
    sampler.remember(more)
    assert torch.equal(sampler.scores(logits), theirs(torch.cat((ids, more[:, None]), dim=1), logits.clone()))


def test_padding_is_not_seen() -> None:
    ids, mask = torch.tensor([[9, 9, 1], [2, 3, 9]]), torch.tensor([[0, 0, 1], [1, 1, 1]])
    seen = seen_tokens(ids, mask, 10)
    assert [row.nonzero().flatten().tolist() for row in seen] == [[1], [2, 3, 9]]


def test_greedy_ignores_everything_but_the_penalty() -> None:
    logits = torch.tensor([[3.0, 2.0, -1.0]])
    sampler = Sampler(Sampling(top_k=1, top_p=0.1), None, CPU)
    assert sampler.scores(logits) is logits
    sampler = Sampler(Sampling(repetition_penalty=2.0), torch.tensor([[True, False, True]]), CPU)
    assert sampler.scores(logits).tolist() == [[1.5, 2.0, -2.0]]
    assert sampler.choose(sampler.scores(logits)).tolist() == [1]


def test_half_precision_is_left_before_the_arithmetic() -> None:
    logits, seen = torch.tensor([[3.0, 2.984375]]).bfloat16(), torch.tensor([[True, True]])
    sampler = Sampler(Sampling(repetition_penalty=1.003), seen, CPU)
    assert sampler.scores(logits).tolist() == (logits.float() / 1.003).tolist()
    assert Sampler(Sampling(temperature=0.7), None, CPU).scores(logits).dtype == torch.float32


@pytest.mark.parametrize(
    ("sampling", "wanted"),
    [
        (Sampling(temperature=1.0, seed=1), [0.4, 0.3, 0.15, 0.1, 0.05]),
        (Sampling(temperature=0.5, seed=2), [0.16, 0.09, 0.0225, 0.01, 0.0025]),
        (Sampling(temperature=2.0, seed=3), [math.sqrt(p) for p in (0.4, 0.3, 0.15, 0.1, 0.05)]),
        (Sampling(temperature=1.0, top_k=3, seed=4), [0.4, 0.3, 0.15, 0, 0]),
        (Sampling(temperature=1.0, top_p=0.65, seed=5), [0.4, 0.3, 0, 0, 0]),
        (Sampling(temperature=1.0, top_k=4, top_p=0.8, seed=6), [0.4, 0.3, 0.15, 0, 0]),
        (Sampling(temperature=1.0, top_p=0.01, seed=7), [1, 0, 0, 0, 0]),
    ],
)
def test_draws_follow_the_probabilities(sampling: Sampling, wanted: list[float]) -> None:
    """Chi-square over five tokens, 0.999 quantile of each number of degrees of freedom."""
    draws = 40_000
    logits = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).log().expand(draws, -1)
    sampler = Sampler(sampling, None, CPU)
    counts = sampler.choose(sampler.scores(logits)).bincount(minlength=5)
    expected = torch.tensor(wanted) / sum(wanted) * draws
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert statistic <= {0: 0.0, 1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47}[int(possible.sum()) - 1]


@pytest.mark.parametrize("seed", [-(2**63), 2**64 - 1])
def test_extremes_that_are_accepted(seed: int) -> None:
    logits = torch.tensor([[300.0, -300.0, 299.0]]).expand(8, -1)
    for penalty in (MOST_PENALTY, 1 / MOST_PENALTY):
        sampling = Sampling(temperature=LEAST_TEMPERATURE, top_p=1e-30, repetition_penalty=penalty, seed=seed)
        sampler = Sampler(sampling, torch.tensor([[True, True, False]]).expand(8, -1), CPU)
        drawn = sampler.choose(sampler.scores(logits))
        assert drawn.tolist() == [2 if penalty > 1 else 0] * 8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature: -1.0; expected 0"),
        ({"temperature": math.nan}, "temperature: nan"),
        ({"top_k": -1}, "top_k: -1; expected 0"),
        ({"top_p": 0.0}, "top_p: 0.0; expected a number above 0, at most 1"),
        ({"top_p": 1.5}, "top_p: 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: 0.0; expected a number from"),
        ({"repetition_penalty": math.inf}, "repetition_penalty: inf"),
        ({"repetition_penalty": 1e-30}, "repetition_penalty: 1e-30; expected a number from 1e-06 to 1e.06"),
        ({"temperature": 1e-38}, r"temperature: 1e-38; expected 0 \(greedy\) or at least 1e-06"),
        ({"temperature": "hot"}, "temperature: 'hot'; expected a number"),
        ({"top_k": 1.5}, "top_k: 1.5; expected an integer"),
        ({"seed": 2**64}, "seed: 18446744073709551616; expected a whole number of 64 bits"),
        ({"seed": -(2**63) - 1}, "seed: -9223372036854775809; expected"),
        ({"stop_ids": (2**63,)}, "stop_ids: .9223372036854775808,.; expected token ids"),
    ],
)
def test_mistakes(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**values)
