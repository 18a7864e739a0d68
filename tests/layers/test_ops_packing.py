"""Packed rows to padded batches and back."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridvl.layers.ops.packing import map_segments, pad_packed, unpad_packed

LENGTHS = st.lists(st.integers(0, 20), min_size=1, max_size=8).filter(any)


def boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


@settings(deadline=None)
@given(lengths=LENGTHS)
def test_padding_stands_right_and_goes_away(lengths: list[int]) -> None:
    cu_seqlens = boundaries(lengths)
    packed = torch.arange(1.0, 2 * sum(lengths) + 1).reshape(1, sum(lengths), 2)
    padded = pad_packed(packed, cu_seqlens)
    assert padded.shape == (len(lengths), max(lengths), 2)
    for row, segment in zip(padded, packed[0].split(lengths), strict=True):
        assert torch.equal(row[: len(segment)], segment)
        assert not row[len(segment) :].any()
    assert torch.equal(unpad_packed(padded, cu_seqlens), packed)


@settings(deadline=None)
@given(lengths=LENGTHS, unit=st.sampled_from([1, 4]))
def test_segments_keep_their_order_states_and_lengths(lengths: list[int], unit: int) -> None:
    packed = torch.arange(1.0, sum(lengths) + 1).reshape(1, -1)
    states = torch.arange(len(lengths)) * 100.0
    calls = slots = 0

    def op(tokens: list[Tensor], state: Tensor | None, sizes: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal calls, slots
        calls += 1
        assert state is not None
        slots += tokens[0].numel()
        assert sizes.tolist() == [lengths[int(n)] for n in state / 100]
        return tokens[0] + state[:, None], state + tokens[0].sum(1)

    output, final = map_segments(op, [packed], states, boundaries(lengths), unit)
    owner = torch.repeat_interleave(states, torch.tensor(lengths))
    assert final is not None
    assert torch.equal(output, packed + owner)
    sums = torch.stack([segment.sum() for segment in packed[0].split(lengths)])
    assert torch.equal(final, states + sums)
    # One call for all segments whose units are as many, counted up to the next power of two.
    assert calls == len({max(math.ceil(length / unit) - 1, 0).bit_length() for length in lengths})
    assert slots <= 2 * sum(-(-length // unit) * unit for length in lengths) + unit * len(lengths)


def test_gradients_pass_through() -> None:
    packed = torch.randn(1, 9, 3, dtype=torch.float64, requires_grad=True)
    cu_seqlens = boundaries([4, 0, 5])
    assert torch.autograd.gradcheck(lambda x: unpad_packed(pad_packed(x, cu_seqlens).sin(), cu_seqlens), (packed,))
