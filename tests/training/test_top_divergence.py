"""Divergences from a teacher's top tokens against their definition over k + 1 outcomes, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from largest import Largest
from torch import Tensor

from hybridvl.layers.errors import ConfigError
from hybridvl.training.losses.divergences import DIVERGENCES, linear_divergence
from hybridvl.training.losses.top_divergence import TopTokens, top_divergence, top_tokens

KINDS = pytest.mark.parametrize("kind", DIVERGENCES)


def inputs(tokens: int, vocab: int, width: int = 5, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(student_hidden, student_weight, teacher_hidden, teacher_weight) in float64; the student's ask for gradients."""
    generator = torch.Generator().manual_seed(tokens * 100 + vocab)
    sizes = (tokens, width), (vocab, width), (tokens, width), (vocab, width)
    drawn = [torch.randn(size, generator=generator, dtype=torch.float64) * scale for size in sizes]
    return drawn[0].requires_grad_(), drawn[1].requires_grad_(), drawn[2], drawn[3]


def collapsed(values: tuple[Tensor, ...], kind: str, k: int, temperature: float) -> Tensor:
    """By definition: both distributions made, all but the teacher's k tokens added up, token by token."""
    student_hidden, student_weight, teacher_hidden, teacher_weight = values
    sums = []
    for h, t in zip(student_hidden, teacher_hidden, strict=True):
        q, p = ((x @ w.T / temperature).softmax(0) for x, w in ((h, student_weight), (t, teacher_weight)))
        top = p.argsort(descending=True)[:k]
        others = torch.ones_like(p).scatter(0, top, 0.0)
        if k < len(p):
            p, q = (torch.cat((x[top], (x * others).sum()[None])) for x in (p, q))
        middle = (p + q) / 2
        sums.append(
            {
                "forward": (p * (p / q).log()).sum(),
                "reverse": (q * (q / p).log()).sum(),
                "jensen_shannon": ((p * (p / middle).log()).sum() + (q * (q / middle).log()).sum()) / 2,
            }[kind]
        )
    return torch.stack(sums).mean() * temperature**2


def exact(values: tuple[Tensor, ...], k: int, temperature: float) -> TopTokens:
    """What is known of the teacher, in float64, so that only the divergence is tested."""
    log_p = (values[2] @ values[3].T / temperature).log_softmax(-1)
    log_probs, tokens = log_p.topk(k)
    return TopTokens(tokens.int(), log_probs, log_p.scatter(-1, tokens, -math.inf).logsumexp(-1))


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(DIVERGENCES),
    tokens=st.integers(1, 12),
    vocab=st.integers(2, 20),
    share=st.floats(0.01, 1),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    chunks=st.tuples(st.integers(1, 15), st.integers(1, 25)),
)
def test_value_and_gradients_are_those_of_the_definition(
    kind: str, tokens: int, vocab: int, share: float, temperature: float, chunks: tuple[int, int]
) -> None:
    values = inputs(tokens, vocab)
    k = max(1, round(share * vocab))
    teacher = exact(values, k, temperature)
    found = top_divergence(values[0], values[1], teacher, kind, temperature, *chunks)
    right = collapsed(values, kind, k, temperature)
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12)
    grads = torch.autograd.grad(3 * found, values[:2])
    for grad, expected in zip(grads, torch.autograd.grad(3 * right, values[:2]), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-11)
    whole = linear_divergence(*values, kind, temperature)
    assert found.item() <= whole.item() + 1e-12


@KINDS
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_all_tokens_are_the_whole_divergence(kind: str, scale: float) -> None:
    values = inputs(9, 30, scale=scale)
    teacher = top_tokens(values[2], values[3], 30, 2.0, 4, 7)
    assert bool((teacher.rest == -math.inf).all())
    found = top_divergence(values[0], values[1], teacher, kind, 2.0, 4, 7)
    whole = linear_divergence(*values, kind, 2.0)
    torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-7)  # the teacher is kept in float32
    for grad, expected in zip(*(torch.autograd.grad(x, values[:2]) for x in (found, whole)), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-7 * float(expected.abs().max()))


@pytest.mark.parametrize("k", [1, 6, 20])
def test_what_is_known_of_the_teacher(k: int) -> None:
    _, _, hidden, weight = inputs(7, 20)
    found, right = top_tokens(hidden, weight, k, 0.7, 3, 6), exact(inputs(7, 20), k, 0.7)
    assert torch.equal(found.tokens, right.tokens)
    assert [value.dtype for value in found] == [torch.int32, torch.float32, torch.float32]
    torch.testing.assert_close(found.log_probs.double(), right.log_probs, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.rest.double(), right.rest, rtol=1e-6, atol=1e-6)
    parts = found.split([3, 0, 4])
    assert [len(part.rest) for part in parts] == [3, 0, 4]
    joined = TopTokens.joined(parts, torch.device("cpu"))
    assert all(torch.equal(one, other) for one, other in zip(joined, found, strict=True))


@KINDS
def test_extreme_logits_stay_finite(kind: str) -> None:
    values = inputs(6, 25, scale=60.0)
    teacher = top_tokens(values[2], values[3], 3)
    found = top_divergence(values[0], values[1], teacher, kind)
    found.backward()
    assert found.isfinite()
    assert all(value.grad.isfinite().all() for value in values[:2])


@KINDS
def test_no_tensor_is_larger_than_the_logits_of_a_chunk(kind: str) -> None:
    values = tuple(value.detach().float().requires_grad_() for value in inputs(64, 400))
    with Largest() as largest:
        teacher = top_tokens(values[2].detach(), values[3].detach(), 5, 2.0, 8, 50)
        top_divergence(values[0], values[1], teacher, kind, 2.0, 8, 50).backward()
    assert largest.numel == 8 * 400


@KINDS
def test_no_tokens_give_zero(kind: str) -> None:
    values = inputs(0, 7)
    teacher = top_tokens(values[2], values[3], 2)
    assert [tuple(value.shape) for value in teacher] == [(0, 2), (0, 2), (0,)]
    found = top_divergence(values[0], values[1], teacher, kind)
    found.backward()
    assert found.item() == 0.0
    assert not values[1].grad.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "kl"}, "divergence: 'kl'; expected one of forward, reverse, jensen_shannon"),
        ({"temperature": 0.0}, "temperature: 0.0; expected a finite number above 0"),
        ({"token_chunk": 0}, "token_chunk: 0; expected a whole number of at least 1"),
    ],
)
def test_mistakes_are_refused(options: dict, message: str) -> None:
    values = inputs(3, 7)
    with pytest.raises(ConfigError) as caught:
        top_divergence(values[0], values[1], top_tokens(values[2], values[3], 2), **options)
    assert str(caught.value) == message
