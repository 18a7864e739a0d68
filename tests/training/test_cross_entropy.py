"""The chunked cross-entropy against torch's own on full logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from largest import Largest
from torch import Tensor

from hybridvl.training.losses.cross_entropy import label_positions, linear_cross_entropy


def _inputs(tokens: int, width: int, vocab: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens * 1000 + width * 10 + vocab)
    hidden = torch.randn(tokens, width, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator, dtype=dtype).requires_grad_()
    return hidden, weight, torch.randint(0, vocab, (tokens,), generator=generator)


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(1, 40), width=st.integers(1, 9), vocab=st.integers(2, 30), chunk=st.integers(1, 50))
def test_loss_and_gradients_match_torch_in_float64(tokens: int, width: int, vocab: int, chunk: int) -> None:
    hidden, weight, labels = _inputs(tokens, width, vocab)
    loss, hits = linear_cross_entropy(hidden, weight, labels, chunk)
    grads = torch.autograd.grad(3.0 * loss, [hidden, weight])
    logits = hidden @ weight.T
    expected = F.cross_entropy(logits, labels)
    expected_grads = torch.autograd.grad(3.0 * expected, [hidden, weight])
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for grad, right in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, right, rtol=1e-10, atol=1e-12)
    assert torch.equal(hits, logits.argmax(-1) == labels)


def test_no_tokens_give_zero_loss_and_zero_gradients() -> None:
    hidden, weight, labels = _inputs(0, 4, 7)
    loss, hits = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert float(loss) == 0.0
    assert hits.shape == (0,)
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("chunk", [8, 32])
def test_no_tensor_is_as_large_as_the_logits_of_more_than_a_chunk(chunk: int) -> None:
    tokens, width, vocab = 128, 4, 500
    hidden, weight, labels = _inputs(tokens, width, vocab, torch.float32)
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, labels, chunk).loss.backward()
    assert largest.numel == chunk * vocab


def test_without_gradients_only_the_loss_is_computed() -> None:
    hidden, weight, labels = _inputs(6, 4, 9)
    with torch.no_grad():
        loss, _ = linear_cross_entropy(hidden, weight, labels, 2)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T, labels).detach())


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, labels = _inputs(6, 4, 9)
    linear_cross_entropy(hidden, weight.requires_grad_(False), labels).loss.backward()
    assert weight.grad is None
    (expected,) = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, labels), hidden)
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-10, atol=1e-14)


def test_bfloat16_keeps_dtypes_and_is_computed_in_float32() -> None:
    hidden, weight, labels = _inputs(50, 16, 40, torch.bfloat16)
    loss, _ = linear_cross_entropy(hidden, weight, labels, 7)
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert loss.dtype == torch.float32
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    wide = [tensor.detach().float().requires_grad_() for tensor in (hidden, weight)]
    expected = F.cross_entropy(wide[0] @ wide[1].T, labels)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=2e-2, atol=0)
    for grad, right in zip((hidden.grad, weight.grad), wide, strict=True):
        assert right.grad is not None
        assert (grad.float() - right.grad).norm() < 2e-2 * right.grad.norm()


def test_autocast_trains_float32_weights() -> None:
    hidden, weight, labels = _inputs(50, 16, 40, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = linear_cross_entropy(hidden.bfloat16(), weight, labels, 7)
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    expected = F.cross_entropy(hidden.detach() @ weight.detach().T, labels)
    torch.testing.assert_close(loss.detach(), expected, rtol=2e-2, atol=0)


def test_chunk_must_be_positive() -> None:
    with pytest.raises(ValueError, match="chunk=0"):
        linear_cross_entropy(*_inputs(2, 2, 2), chunk=0)


def test_labels_are_predicted_from_the_position_before() -> None:
    labels = torch.tensor([[5, -100, 7, 8], [-100, -100, -100, 9]])
    assert label_positions(labels).tolist() == [[False, True, True, False], [False, False, True, False]]
