"""The chunked divergences against float64 autograd through full logits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from largest import Largest
from pairs import LiveBytes
from torch import Tensor

from hybridvl.layers.errors import ConfigError
from hybridvl.training.losses.divergences import DIVERGENCES, linear_divergence

KINDS = pytest.mark.parametrize("kind", DIVERGENCES)


def inputs(
    tokens: int, width: int, vocab: int, teacher_width: int | None = None, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(student_hidden, student_weight, teacher_hidden, teacher_weight); the student's ask for gradients."""
    generator = torch.Generator().manual_seed(tokens * 1000 + width * 10 + vocab)
    sizes = (tokens, width), (vocab, width), (tokens, teacher_width or width), (vocab, teacher_width or width)
    drawn = [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]
    return drawn[0].requires_grad_(), drawn[1].requires_grad_(), drawn[2], drawn[3]


def full_logits(
    values: tuple[Tensor, ...], kind: str, temperature: float = 1.0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """The same by its definition."""
    student_hidden, student_weight, teacher_hidden, teacher_weight = (value.to(dtype) for value in values)
    log_q = (student_hidden @ student_weight.T / temperature).log_softmax(-1)
    log_p = (teacher_hidden @ teacher_weight.T / temperature).log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    to_middle = [(log.exp() * (log - log_m)).sum(-1) for log in (log_p, log_q)]
    found = {
        "forward": (log_p.exp() * (log_p - log_q)).sum(-1),
        "reverse": (log_q.exp() * (log_q - log_p)).sum(-1),
        "jensen_shannon": (to_middle[0] + to_middle[1]) / 2,
    }[kind]
    return found.mean() * temperature**2


def assert_near(found: Tensor, right: Tensor, tolerance: float) -> None:
    """Close by norm."""
    assert found.shape == right.shape
    assert (found.double() - right).norm() <= tolerance * right.norm()


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(DIVERGENCES),
    tokens=st.integers(1, 40),
    width=st.integers(1, 9),
    teacher_width=st.integers(1, 9),
    vocab=st.integers(2, 30),
    token_chunk=st.integers(1, 50),
    vocab_chunk=st.integers(1, 40),
    temperature=st.floats(0.5, 4.0),
)
def test_value_and_gradients_match_full_logits_in_float64(
    kind: str,
    tokens: int,
    width: int,
    teacher_width: int,
    vocab: int,
    token_chunk: int,
    vocab_chunk: int,
    temperature: float,
) -> None:
    values = inputs(tokens, width, vocab, teacher_width)
    found = linear_divergence(*values, kind, temperature, token_chunk, vocab_chunk)
    right = full_logits(values, kind, temperature)
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12)
    grads = torch.autograd.grad(3.0 * found, values[:2])
    for grad, expected in zip(grads, torch.autograd.grad(3.0 * right, values[:2]), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-12)


@KINDS
def test_float32_at_a_large_vocabulary(kind: str) -> None:
    values = inputs(9, 16, 151_936, 24, torch.float32)
    found = linear_divergence(*values, kind, 2.0, token_chunk=4)
    right = full_logits(values, kind, 2.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=0)
    grads = torch.autograd.grad(found, values[:2])
    for grad, expected in zip(grads, torch.autograd.grad(right, values[:2]), strict=True):
        assert grad.dtype == torch.float32
        assert_near(grad, expected.double(), 1e-4)


def test_two_tokens_by_hand() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    even, uneven = torch.zeros(2, 1, dtype=torch.float64), torch.tensor([[math.log(3.0)], [0.0]], dtype=torch.float64)
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    middle = (0.75 * math.log(6 / 5) + 0.25 * math.log(2 / 3) + 0.5 * math.log(4 / 5) + 0.5 * math.log(4 / 3)) / 2
    for kind, right in zip(DIVERGENCES, (forward, reverse, middle), strict=True):
        assert float(linear_divergence(one, even, one, uneven, kind)) == pytest.approx(right, rel=1e-12)


@KINDS
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(kind: str) -> None:
    hidden, weight, _, _ = inputs(20, 8, 1000, dtype=torch.float32)
    found = linear_divergence(hidden, weight, hidden.detach(), weight.detach(), kind, 2.0, 7, 300)
    grads = torch.autograd.grad(found, [hidden, weight])
    assert abs(found.item()) < (1e-6 if kind == "jensen_shannon" else 1e-30)
    assert all(grad.abs().max() < 1e-9 for grad in grads)


@KINDS
@pytest.mark.parametrize("size", [30.0, 1e3, 1e6])
def test_extreme_logits_give_no_nan(kind: str, size: float) -> None:
    values = inputs(12, 8, 50, dtype=torch.float32)
    student_hidden = (values[0].detach() * size).requires_grad_()
    values = (student_hidden, values[1], values[2] * size, values[3])
    found = linear_divergence(*values, kind, 1.0, 5, 13)
    right, plain = full_logits(values, kind), full_logits(values, kind, dtype=torch.float32)
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=0)
    grads = [torch.autograd.grad(value, values[:2]) for value in (found, right, plain)]
    for ours, exact, rounded in zip(*grads, strict=True):
        assert ours.isfinite().all()
        # Rounded logits are off by more than their differences: no worse than float32's own log_softmax.
        assert (ours - exact).norm() <= 2 * (rounded - exact).norm() + 1e-6 * exact.norm()


@KINDS
def test_gradcheck(kind: str) -> None:
    student_hidden, student_weight, teacher_hidden, teacher_weight = inputs(4, 3, 7, 2)

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_divergence(hidden, weight, teacher_hidden, teacher_weight, kind, 1.7, 3, 4)

    assert torch.autograd.gradcheck(run, (student_hidden, student_weight))


@KINDS
@pytest.mark.parametrize("chunk", [8, 32])
def test_no_tensor_is_larger_than_the_logits_of_a_chunk(kind: str, chunk: int) -> None:
    tokens, width, vocab = 128, 4, 500
    values = inputs(tokens, width, vocab, dtype=torch.float32)
    with Largest() as largest:
        linear_divergence(*values, kind, 2.0, chunk, 64).backward()
    assert largest.numel == chunk * vocab < tokens * vocab


def test_the_heads_gradient_is_in_memory_once() -> None:
    values = inputs(8, 64, 5000, dtype=torch.float32)
    with LiveBytes() as live:
        linear_divergence(*values, "forward", 2.0, 4, 500).backward()
    assert values[1].grad is not None
    assert values[1].grad.nbytes <= live.peak < 1.5 * values[1].grad.nbytes


@KINDS
def test_tokens_are_averaged_whatever_their_number(kind: str) -> None:
    values = inputs(6, 5, 40)
    found = linear_divergence(*values, kind, 2.0, 4)
    many = (values[0].repeat(8, 1), values[1], values[2].repeat(8, 1), values[3])
    repeated = linear_divergence(*many, kind, 2.0, 4)
    torch.testing.assert_close(repeated, found, rtol=1e-12, atol=0)
    grads = torch.autograd.grad(repeated, values[:2])
    for grad, expected in zip(grads, torch.autograd.grad(found, values[:2]), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-14)


@KINDS
def test_no_tokens_give_zero_and_zero_gradients(kind: str) -> None:
    values = inputs(0, 4, 7)
    found = linear_divergence(*values, kind)
    found.backward()
    assert found.item() == 0.0
    assert values[0].grad is not None
    assert values[0].grad.shape == (0, 4)
    assert values[1].grad is not None
    assert values[1].grad.shape == (7, 4)
    assert not values[1].grad.any()


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 10), vocab=st.integers(2, 30), size=st.floats(0.01, 30.0))
def test_jensen_shannon_is_symmetric_and_at_most_log_2(tokens: int, vocab: int, size: float) -> None:
    values = [value.detach() for value in inputs(tokens, 4, vocab)]
    left, right = (values[0] * size, values[1]), (values[2] * size, values[3])
    there, back = (linear_divergence(*a, *b, "jensen_shannon") for a, b in ((left, right), (right, left)))
    torch.testing.assert_close(there, back, rtol=1e-9, atol=1e-15)
    assert -1e-15 <= float(there) <= math.log(2) + 1e-15


def test_reverse_is_forward_with_the_roles_exchanged() -> None:
    values = [value.detach() for value in inputs(5, 4, 30)]
    forward = linear_divergence(*values, "forward", 1.3)
    reverse = linear_divergence(*values[2:], *values[:2], "reverse", 1.3)
    torch.testing.assert_close(forward, reverse, rtol=1e-12, atol=0)


def test_a_frozen_head_gets_no_gradient_and_neither_does_the_teacher() -> None:
    values = inputs(6, 4, 9)
    student_hidden, student_weight, teacher_hidden, teacher_weight = values
    teacher_hidden.requires_grad_()
    teacher_weight.requires_grad_()
    linear_divergence(student_hidden, student_weight.requires_grad_(False), teacher_hidden, teacher_weight).backward()
    (expected,) = torch.autograd.grad(full_logits(values, "forward"), student_hidden)
    torch.testing.assert_close(student_hidden.grad, expected, rtol=1e-10, atol=1e-14)
    assert all(tensor.grad is None for tensor in (student_weight, teacher_hidden, teacher_weight))


def test_without_gradients_the_value_is_the_same() -> None:
    values = inputs(6, 4, 9)
    with torch.no_grad():
        found = linear_divergence(*values, "reverse", 2.0, 4, 4)
    assert not found.requires_grad
    assert torch.equal(found, linear_divergence(*values, "reverse", 2.0, 4, 4).detach())


def test_gradients_can_be_taken_twice_from_one_graph() -> None:
    values = inputs(6, 4, 9)
    found = linear_divergence(*values)
    first = torch.autograd.grad(found, values[:2], retain_graph=True)
    second = torch.autograd.grad(2.0 * found, values[:2])
    assert all(torch.equal(2.0 * left, right) for left, right in zip(first, second, strict=True))


@KINDS
def test_bfloat16_keeps_dtypes_and_is_computed_in_float32(kind: str) -> None:
    values = inputs(50, 16, 40, dtype=torch.bfloat16)
    found = linear_divergence(*values, kind, 2.0, 7, 16)
    found.backward()
    wide = tuple(value.detach().double() for value in values)
    right = full_logits((wide[0].requires_grad_(), wide[1].requires_grad_(), *wide[2:]), kind, 2.0)
    right.backward()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), right, rtol=2e-2, atol=0)
    for value, expected in zip(values[:2], wide[:2], strict=True):
        assert value.grad is not None
        assert expected.grad is not None
        assert value.grad.dtype == torch.bfloat16
        assert_near(value.grad, expected.grad, 2e-2)


def test_autocast_trains_float32_weights() -> None:
    values = inputs(50, 16, 40, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_divergence(values[0].bfloat16(), values[1], values[2].bfloat16(), values[3])
    found.backward()
    assert values[1].grad is not None
    assert values[1].grad.dtype == torch.float32
    torch.testing.assert_close(found.detach().double(), full_logits(values, "forward").detach(), rtol=2e-2, atol=0)


def test_mistakes_are_named() -> None:
    values = inputs(3, 4, 9)
    with pytest.raises(ConfigError, match=r"divergence: 'kl'; expected one of forward, reverse, jensen_shannon"):
        linear_divergence(*values, "kl")
    with pytest.raises(ConfigError, match=r"temperature: 0.0"):
        linear_divergence(*values, temperature=0.0)
    with pytest.raises(ConfigError, match=r"temperature: inf"):
        linear_divergence(*values, temperature=math.inf)
    with pytest.raises(ConfigError, match="token_chunk: 0"):
        linear_divergence(*values, token_chunk=0)
    with pytest.raises(ConfigError, match="vocab_chunk: -1"):
        linear_divergence(*values, vocab_chunk=-1)
    with pytest.raises(ConfigError, match="vocabulary has 9 tokens and the teacher's 8"):
        linear_divergence(*values[:3], values[3][:8])
    with pytest.raises(ConfigError, match="hidden states of 3 tokens and the teacher of 2"):
        linear_divergence(*values[:2], values[2][:2], values[3])
    with pytest.raises(ConfigError, match=r"teacher's hidden states have the shape \(3, 3\) and its head \(9, 4\)"):
        linear_divergence(*values[:2], values[2][:, :3], values[3])
