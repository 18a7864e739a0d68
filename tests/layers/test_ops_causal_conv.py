"""The causal convolution against stored float64 cases, torch's own `conv1d`, and its state across splits."""

from __future__ import annotations

import re
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_support import arrays, assert_close, case_inputs, cases, outputs_and_gradients, relative
from torch import Tensor

from hybridvl.layers.errors import ConfigError
from hybridvl.layers.ops import causal_conv

CASES = [name for name in cases() if name.startswith("conv.")]
BACKENDS = ("reference", "torch")


def random_inputs(tokens: int, batch: int = 2, channels: int = 5, width: int = 4, seed: int = 0) -> dict[str, Tensor]:
    make = partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {
        "x": make(batch, tokens, channels),
        "weight": make(channels, width),
        "bias": make(channels),
        "initial_state": make(batch, channels, width),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_stored_cases(case: str, dtype: torch.dtype, backend: str) -> None:
    inputs, cu_seqlens, upstream = case_inputs(case, dtype)
    activation = cases()[case]["activation"]
    y, final = causal_conv(**inputs, activation=activation, cu_seqlens=cu_seqlens, backend=backend)
    (y * upstream["dy"]).sum().backward()
    got = {"y": y, "final_state": final} | {f"d{name}": x.grad for name, x in inputs.items() if x.grad is not None}
    assert_close(got, arrays("expected", case), 1e-9 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 12),
    batch=st.integers(1, 3),
    width=st.integers(1, 6),
    bias=st.booleans(),
    activation=st.sampled_from(["silu", None]),
    seed=st.integers(0, 1000),
)
def test_equals_conv1d(
    backend: str, tokens: int, batch: int, width: int, bias: bool, activation: str | None, seed: int
) -> None:
    inputs = random_inputs(tokens, batch, width=width, seed=seed)
    if not bias:
        del inputs["bias"]

    def with_conv1d(
        x: Tensor, weight: Tensor, initial_state: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        everything = torch.cat([initial_state, x.mT], dim=2)  # (B, D, W + T)
        y = F.conv1d(everything[..., 1:], weight[:, None], bias, groups=weight.shape[0]).mT
        return F.silu(y) if activation else y, everything[..., -weight.shape[1] :]

    got = outputs_and_gradients(partial(causal_conv, activation=activation, backend=backend), inputs)
    assert_close(got, outputs_and_gradients(with_conv1d, inputs), 1e-12)


@pytest.mark.parametrize("splits", [(1, 19), (3, 17), (1, 1, 1, 1, 16), (10, 2, 8)], ids=str)
def test_pieces_with_carried_state_equal_one_pass(splits: tuple[int, ...]) -> None:
    inputs = random_inputs(20)

    def in_pieces(x: Tensor, weight: Tensor, bias: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for piece in x.split(splits, dim=1):
            y, initial_state = causal_conv(piece, weight, bias, initial_state)
            outputs.append(y)
        return torch.cat(outputs, dim=1), initial_state

    assert_close(outputs_and_gradients(in_pieces, inputs), outputs_and_gradients(causal_conv, inputs), 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("lengths", [(5, 5), (7, 1, 2, 10), (0, 4, 0, 1)], ids=str)
def test_packed_equals_segments(lengths: tuple[int, ...], state: bool, backend: str) -> None:
    inputs = random_inputs(sum(lengths), batch=1)
    inputs["initial_state"] = random_inputs(1, batch=len(lengths), seed=1)["initial_state"]
    if not state:
        del inputs["initial_state"]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)

    def one_by_one(
        x: Tensor, weight: Tensor, bias: Tensor, initial_state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        pieces = []
        for n, piece in enumerate(x.split(lengths, dim=1)):
            own = None if initial_state is None else initial_state[n : n + 1]
            pieces.append(causal_conv(piece, weight, bias, own, backend="reference"))
        return torch.cat([y for y, _ in pieces], dim=1), torch.cat([final for _, final in pieces])

    packed = outputs_and_gradients(partial(causal_conv, cu_seqlens=cu_seqlens, backend=backend), inputs)
    assert_close(packed, outputs_and_gradients(one_by_one, inputs), 1e-12)


@pytest.mark.parametrize("short", [0, 1000])
def test_the_oldest_input_of_a_state_is_not_read(short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["hybridvl.layers.ops.causal_conv"], "_SHORT", short)
    cu_seqlens, lengths = torch.tensor([0, 4, 4, 6]), (4, 0, 2)
    inputs = random_inputs(sum(lengths), batch=1) | {"initial_state": random_inputs(1, 3, seed=1)["initial_state"]}
    inputs["initial_state"][:, :, 0] = float("nan")
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    y, final = causal_conv(**inputs, cu_seqlens=cu_seqlens)
    assert final[1, :, 0].isnan().all()  # a segment without tokens keeps its state
    assert final.isnan().sum() == final.shape[1]
    for gradient in torch.autograd.grad(y.square().sum(), list(inputs.values())):
        assert gradient.isfinite().all()


def test_final_state_holds_the_last_inputs() -> None:
    x = torch.arange(1.0, 7.0).reshape(1, 6, 1)
    weight = torch.ones(1, 4)
    assert causal_conv(x, weight)[1].tolist() == [[[3, 4, 5, 6]]]
    assert causal_conv(x[:, :2], weight)[1].tolist() == [[[0, 0, 1, 2]]]
    state = torch.tensor([[[-4.0, -3, -2, -1]]])
    y, final = causal_conv(x[:, :2], weight, initial_state=state, activation=None)
    assert final.tolist() == [[[-2, -1, 1, 2]]]
    assert y.flatten().tolist() == [-3 - 2 - 1 + 1, -2 - 1 + 1 + 2]


def test_no_tokens_leave_the_state() -> None:
    inputs = random_inputs(0)
    for backend in BACKENDS:
        y, final = causal_conv(**inputs, backend=backend)
        assert y.shape == (2, 0, 5)
        assert torch.equal(final, inputs["initial_state"])


def test_bfloat16_sums_in_float32() -> None:
    low = {name: x.bfloat16() for name, x in random_inputs(40).items()}
    y, final = causal_conv(**low)
    expected, _ = causal_conv(**{name: x.double() for name, x in low.items()})
    assert y.dtype == final.dtype == torch.bfloat16
    assert torch.equal(y, expected.bfloat16())
    assert torch.equal(final, low["x"][:, -4:].mT)
    gradients = outputs_and_gradients(causal_conv, low)
    assert_close(gradients, outputs_and_gradients(causal_conv, {name: x.double() for name, x in low.items()}), 8e-3)


def test_autocast_does_not_lower_the_precision() -> None:
    inputs = {name: x.float() for name, x in random_inputs(40).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = causal_conv(**inputs)
    assert relative(y, causal_conv(**inputs)[0]) == 0.0


def test_runs_on_the_meta_device() -> None:
    y, final = causal_conv(**{name: x.to("meta") for name, x in random_inputs(7).items()})
    assert y.shape == (2, 7, 5)
    assert final.shape == (2, 5, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 10)}, "causal_conv: x has shape (2, 10), expected (B, T, D) = (any, any, any)"),
        ({"weight": torch.zeros(5, 1, 4)}, "weight has shape (5, 1, 4), expected (D, W) = (5, any)"),
        ({"weight": torch.zeros(5, 0)}, "weight has width 0"),
        ({"bias": torch.zeros(4)}, "bias has shape (4,), expected (D,) = (5)"),
        ({"initial_state": torch.zeros(2, 5, 3)}, "initial_state has shape (2, 5, 3), expected (N, D, W) = (2, 5, 4)"),
        ({"activation": "relu"}, "activation is 'relu', expected 'silu' or None"),
        ({"cu_seqlens": torch.tensor([0.0, 10.0])}, "cu_seqlens has shape (2,) and dtype torch.float32"),
    ],
)
def test_mistakes_are_named(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {name: x.float() for name, x in random_inputs(10).items()}
    with pytest.raises(ConfigError, match=re.escape(message)):
        causal_conv(**(arguments | change))  # type: ignore[arg-type]


@pytest.mark.parametrize("block", [1, 15, 40], ids=lambda block: f"blocks of {block}")
@pytest.mark.parametrize(
    ("segments", "short"),
    [(None, 0), ((0, 1, 3, 3, 10, 23), 0), ((0, 1, 3, 3, 10, 23), 1000)],
    ids=["rows", "packed", "joined"],
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 0.03)]
)
@pytest.mark.parametrize(("width", "bias", "activation"), [(4, True, "silu"), (1, False, "silu"), (6, False, None)])
def test_blocks_of_tokens(
    block: int,
    segments: tuple[int, ...] | None,
    short: int,
    dtype: torch.dtype,
    tolerance: float,
    width: int,
    bias: bool,
    activation: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks of one token, of some, with ragged ends; segments shorter than the convolution, called for one by one or
    joined; fresh memory holds NaN."""
    empty = torch.empty
    monkeypatch.setattr(sys.modules["hybridvl.layers.ops.causal_conv"], "_SHORT", short)
    monkeypatch.setattr("hybridvl.layers.ops.blocked_conv._BLOCK", block)
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan")))
    cu_seqlens = None if segments is None else torch.tensor(segments)
    inputs = random_inputs(23, 2 if segments is None else 1, width=width)
    if segments is not None:
        inputs["initial_state"] = random_inputs(1, len(segments) - 1, width=width, seed=1)["initial_state"]
    if not bias:
        del inputs["bias"]
    expected = outputs_and_gradients(
        partial(causal_conv, activation=activation, cu_seqlens=cu_seqlens, backend="reference"), inputs
    )
    narrow = {name: x.to(dtype) for name, x in inputs.items()}
    got = outputs_and_gradients(partial(causal_conv, activation=activation, cu_seqlens=cu_seqlens), narrow)
    assert {x.dtype for x in got.values()} == {dtype}
    assert_close(got, expected, tolerance)


def test_gradient_of_the_output_alone_and_of_the_state_alone() -> None:
    inputs = {name: x.requires_grad_() for name, x in random_inputs(9).items()}
    for which in (0, 1):
        got = torch.autograd.grad(causal_conv(**inputs)[which].square().sum(), list(inputs.values()), allow_unused=True)
        wanted = torch.autograd.grad(
            causal_conv(**inputs, backend="reference")[which].square().sum(), list(inputs.values()), allow_unused=True
        )
        for name, own, other in zip(inputs, got, wanted, strict=True):
            expected = torch.zeros_like(own) if other is None else other
            torch.testing.assert_close(own, expected, rtol=0, atol=1e-12, msg=name)


def test_strided_input_is_read_in_place() -> None:
    wide = torch.randn(2, 11, 12, dtype=torch.float64)
    inputs = random_inputs(11)
    y, final = causal_conv(wide[..., 3:8], inputs["weight"])
    expected, state = causal_conv(wide[..., 3:8].clone(), inputs["weight"], backend="reference")
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    assert torch.equal(final, state)
