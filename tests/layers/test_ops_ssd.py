"""SSD against stored float64 cases, its own recurrence, and properties that hold for any input."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ops_support import RAGGED, arrays, assert_close, case_inputs, cases, outputs_and_gradients, relative
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hybridvl.layers.errors import ConfigError
from hybridvl.layers.ops import ssd
from hybridvl.layers.ops.ssd import ssd_flops

CASES = [name for name in cases() if name.startswith("ssd.")]
BACKENDS = ("reference", "torch")
SHARED = ("A", "D", "initial_state")  # arguments without a time axis


def random_inputs(tokens: int, batch: int = 2, heads: int = 4, groups: int = 2, seed: int = 0) -> dict[str, Tensor]:
    make = partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {
        "x": make(batch, tokens, heads, 6),
        "dt": F.softplus(make(batch, tokens, heads)),
        "A": -make(heads).exp(),
        "B": make(batch, tokens, groups, 8),
        "C": make(batch, tokens, groups, 8),
        "D": make(heads),
        "initial_state": make(batch, heads, 6, 8),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_stored_cases(case: str, dtype: torch.dtype, backend: str) -> None:
    inputs, cu_seqlens, upstream = case_inputs(case, dtype)
    arguments = dict(inputs)
    if cases()[case]["raw_dt_softplus"]:
        arguments["dt"] = F.softplus(arguments.pop("dt_raw") + arguments.pop("dt_bias"))
    y, final = ssd(**arguments, cu_seqlens=cu_seqlens, backend=backend)
    ((y * upstream["dy"]).sum() + (final * upstream["dfinal_state"]).sum()).backward()
    got = {"y": y, "final_state": final} | {f"d{name}": x.grad for name, x in inputs.items() if x.grad is not None}
    assert_close(got, arrays("expected", case), 1e-9 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("tokens", RAGGED)
def test_chunks_equal_recurrence(tokens: int) -> None:
    inputs = random_inputs(tokens)
    expected = outputs_and_gradients(partial(ssd, backend="reference"), inputs)
    assert_close(outputs_and_gradients(partial(ssd, backend="torch"), inputs), expected, 1e-11)
    single = {name: x.float() for name, x in inputs.items()}
    assert_close(outputs_and_gradients(partial(ssd, backend="torch"), single), expected, 2e-5)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 100),
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    repeats=st.integers(1, 3),
    optional=st.booleans(),
    seed=st.integers(0, 1000),
)
@example(tokens=52, batch=1, groups=1, repeats=1, optional=True, seed=1000)  # its only head forgets all at once
def test_any_shape(tokens: int, batch: int, groups: int, repeats: int, optional: bool, seed: int) -> None:
    inputs = random_inputs(tokens, batch, groups * repeats, groups, seed)
    if not optional:
        del inputs["D"], inputs["initial_state"]
    expected = outputs_and_gradients(partial(ssd, backend="reference"), inputs)
    # Decays below e^-40 count as zero, and so does what is left of the state behind them.
    vanishing = tuple(name for name in expected if expected[name].abs().max() < 1e-12)
    assert_close(outputs_and_gradients(partial(ssd, backend="torch"), inputs), expected, 1e-10, vanishing)


@pytest.mark.parametrize("splits", [(1, 129), (64, 66), (33, 2, 95), (*[1] * 10, 120)], ids=str)
def test_chunks_with_carried_state_equal_one_pass(splits: tuple[int, ...]) -> None:
    inputs = random_inputs(130)

    def in_pieces(A: Tensor, D: Tensor, initial_state: Tensor, **tokens: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for piece in zip(*(x.split(splits, dim=1) for x in tokens.values()), strict=True):
            named = dict(zip(tokens, piece, strict=True))
            y, initial_state = ssd(**named, A=A, D=D, initial_state=initial_state)
            outputs.append(y)
        return torch.cat(outputs, dim=1), initial_state

    assert_close(outputs_and_gradients(in_pieces, inputs), outputs_and_gradients(ssd, inputs), 1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(40, 40, 40), (70, 3, 1, 33), (0, 5, 0, 50)], ids=str)
def test_packed_equals_segments(lengths: tuple[int, ...], backend: str) -> None:
    inputs = random_inputs(sum(lengths), batch=1)
    inputs["initial_state"] = random_inputs(1, batch=len(lengths), seed=1)["initial_state"]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)

    def one_by_one(A: Tensor, D: Tensor, initial_state: Tensor, **tokens: Tensor) -> tuple[Tensor, Tensor]:
        outputs, finals = [], []
        for n, length in enumerate(lengths):
            start = int(cu_seqlens[n])
            piece = {name: x[:, start : start + length] for name, x in tokens.items()}
            y, final = ssd(**piece, A=A, D=D, initial_state=initial_state[n : n + 1], backend="reference")
            outputs.append(y)
            finals.append(final)
        return torch.cat(outputs, dim=1), torch.cat(finals)

    packed = outputs_and_gradients(partial(ssd, cu_seqlens=cu_seqlens, backend=backend), inputs)
    assert_close(packed, outputs_and_gradients(one_by_one, inputs), 1e-11)


@pytest.mark.parametrize("strong", [-30.0, -1e4, -1e30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_strong_decay(strong: float, dtype: torch.dtype) -> None:
    inputs = {name: x.to(dtype) for name, x in random_inputs(100).items()}
    inputs["A"][1] = strong
    doubled = {name: x.double() for name, x in inputs.items()}
    expected = outputs_and_gradients(partial(ssd, backend="reference"), doubled)
    got = outputs_and_gradients(partial(ssd, backend="torch"), inputs)
    assert all(x.isfinite().all() for x in got.values())
    assert_close(got, expected, 1e-10 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("seed", range(3))
def test_gradients_of_large_steps_keep_their_digits(seed: int) -> None:
    """A decay's gradient holds only what crosses it, so that a large step does not magnify what cancels."""
    inputs = {name: x.float() for name, x in random_inputs(333, seed=seed).items()}
    inputs["A"] *= 20
    expected = outputs_and_gradients(
        partial(ssd, backend="reference"), {name: x.double() for name, x in inputs.items()}
    )
    assert_close(outputs_and_gradients(partial(ssd, backend="torch"), inputs), expected, 1.5e-6)


def test_bfloat16_computes_in_float32() -> None:
    low = {name: x.bfloat16() if name in ("x", "B", "C") else x.float() for name, x in random_inputs(130).items()}
    got = outputs_and_gradients(ssd, low)
    expected = outputs_and_gradients(ssd, {name: x.double() for name, x in low.items()})
    assert got["output"].dtype == torch.bfloat16
    assert got["final"].dtype == torch.float32
    assert relative(got["final"], expected["final"]) < 2e-6
    assert_close(got, expected, 4e-3)  # what rounding the results to bfloat16 costs


@pytest.mark.parametrize("tokens", [2, 70])
def test_autocast_does_not_lower_the_precision(tokens: int) -> None:
    inputs = {name: x.float() for name, x in random_inputs(tokens).items()}
    with_autocast = torch.autocast("cpu", dtype=torch.bfloat16)(ssd)
    assert_close(outputs_and_gradients(with_autocast, inputs), outputs_and_gradients(ssd, inputs), 1e-7)


@pytest.mark.parametrize("tokens", [4, 5, 32, 40, 130])
def test_flops_are_those_of_the_meta_device(tokens: int) -> None:
    inputs = {name: x.float().to("meta") for name, x in random_inputs(tokens).items()}
    with FlopCounterMode(display=False) as counter:
        y, final = ssd(**inputs)
    assert y.shape == (2, tokens, 4, 6)
    assert final.shape == (2, 4, 6, 8)
    assert counter.get_total_flops() == ssd_flops(2, tokens, 4, 6, 8)


def test_zero_steps_leave_the_state() -> None:
    inputs = random_inputs(40)
    inputs["dt"] = torch.zeros_like(inputs["dt"])
    assert torch.equal(ssd(**inputs)[1], inputs["initial_state"])


def test_no_tokens_leave_the_state() -> None:
    inputs = random_inputs(0)
    y, final = ssd(**inputs)
    assert y.shape == (2, 0, 4, 6)
    assert torch.equal(final, inputs["initial_state"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt": torch.zeros(2, 10)}, "ssd: dt has shape (2, 10), expected (B, T, H) = (2, 10, 4)"),
        ({"A": torch.zeros(3)}, "A has shape (3,), expected (H,) = (4)"),
        ({"B": torch.zeros(2, 9, 2, 8)}, "B has shape (2, 9, 2, 8), expected (B, T, G, N)"),
        ({"C": torch.zeros(2, 10, 2, 7)}, "C has shape (2, 10, 2, 7), expected (B, T, G, N) = (2, 10, 2, 8)"),
        ({"B": torch.zeros(2, 10, 3, 8), "C": torch.zeros(2, 10, 3, 8)}, "x has 4 heads, expected a multiple of the 3"),
        ({"D": torch.zeros(4, 6)}, "D has shape (4, 6)"),
        ({"initial_state": torch.zeros(2, 4, 8, 6)}, "initial_state has shape (2, 4, 8, 6)"),
        ({"backend": "cudnn"}, "backend 'cudnn' is unknown; accepted: auto, fla, reference, torch"),
    ],
)
def test_mistakes_are_named(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {name: x.float() for name, x in random_inputs(10).items()}
    with pytest.raises(ConfigError, match=re.escape(message)):
        ssd(**(arguments | change))  # type: ignore[arg-type]
