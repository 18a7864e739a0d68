"""The gated delta rule against stored float64 cases, its own recurrence, and properties that hold for any input."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_support import RAGGED, arrays, assert_close, case_inputs, cases, outputs_and_gradients, relative
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hybridvl.layers.errors import ConfigError
from hybridvl.layers.ops import chunked_groups, gated_delta_rule
from hybridvl.layers.ops.gated_delta_rule import gated_delta_rule_flops

CASES = [name for name in cases() if name.startswith("gdr.")]
BACKENDS = ("reference", "torch")


def random_inputs(
    tokens: int, batch: int = 2, heads: int = 2, key_heads: int | None = None, state: bool = True, seed: int = 0
) -> dict[str, Tensor]:
    make = partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    key_heads = key_heads or heads
    inputs = {
        "q": F.normalize(make(batch, tokens, key_heads, 8), dim=-1),
        "k": F.normalize(make(batch, tokens, key_heads, 8), dim=-1),
        "v": make(batch, tokens, heads, 6),
        "g": -make(batch, tokens, heads).abs(),
        "beta": make(batch, tokens, heads).sigmoid(),
    }
    return inputs | ({"initial_state": make(batch, heads, 8, 6)} if state else {})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_stored_cases(case: str, dtype: torch.dtype, backend: str) -> None:
    inputs, cu_seqlens, upstream = case_inputs(case, dtype)
    options = cases()[case]
    o, final = gated_delta_rule(
        **inputs,
        scale=options["scale"],
        qk_l2norm=options["use_qk_l2norm"],
        cu_seqlens=cu_seqlens,
        backend=backend,
    )
    ((o * upstream["do"]).sum() + (final * upstream["dfinal_state"]).sum()).backward()
    got = {"o": o, "final_state": final} | {f"d{name}": x.grad for name, x in inputs.items() if x.grad is not None}
    strong = "strong" in case
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4 if strong else 2e-5
    vanishing = ("dg", "dinitial_state") if case == "gdr.all_strong_T33" else ()
    assert_close(got, arrays("expected", case), tolerance, vanishing)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("tokens", RAGGED)
def test_chunks_equal_recurrence(tokens: int, state: bool) -> None:
    inputs = random_inputs(tokens, state=state)
    expected = outputs_and_gradients(partial(gated_delta_rule, backend="reference"), inputs)
    assert_close(outputs_and_gradients(partial(gated_delta_rule, backend="torch"), inputs), expected, 1e-11)
    single = {name: x.float() for name, x in inputs.items()}
    assert_close(outputs_and_gradients(partial(gated_delta_rule, backend="torch"), single), expected, 2e-5)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 100),
    batch=st.integers(1, 3),
    key_heads=st.integers(1, 3),
    repeats=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_any_shape(tokens: int, batch: int, key_heads: int, repeats: int, seed: int) -> None:
    inputs = random_inputs(tokens, batch, key_heads * repeats, key_heads, seed=seed)
    expected = outputs_and_gradients(partial(gated_delta_rule, backend="reference"), inputs)
    assert_close(outputs_and_gradients(partial(gated_delta_rule, backend="torch"), inputs), expected, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_heads_are_repeated_in_order(backend: str) -> None:
    inputs = random_inputs(40, heads=6, key_heads=2)
    grouped = gated_delta_rule(**inputs, backend=backend)
    inputs |= {name: inputs[name].repeat_interleave(3, dim=2) for name in ("q", "k")}
    assert_close(dict(enumerate(grouped)), dict(enumerate(gated_delta_rule(**inputs, backend="reference"))), 1e-12)


@pytest.mark.parametrize("groups", [1, 1000])
def test_groups_of_chunks_change_nothing(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = random_inputs(300)
    expected = outputs_and_gradients(partial(gated_delta_rule, backend="reference"), inputs)
    monkeypatch.setattr("hybridvl.layers.ops.chunk_layout._GROUP_NUMBERS", groups * 1024)
    assert_close(outputs_and_gradients(gated_delta_rule, inputs), expected, 1e-11)


@pytest.mark.parametrize("splits", [(130,), (1, 129), (64, 66), (33, 2, 95), (*[1] * 10, 120)], ids=str)
def test_chunks_with_carried_state_equal_one_pass(splits: tuple[int, ...]) -> None:
    inputs = random_inputs(130)

    def in_pieces(initial_state: Tensor, **tokens: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for piece in zip(*(x.split(splits, dim=1) for x in tokens.values()), strict=True):
            o, initial_state = gated_delta_rule(**dict(zip(tokens, piece, strict=True)), initial_state=initial_state)
            outputs.append(o)
        return torch.cat(outputs, dim=1), initial_state

    assert_close(outputs_and_gradients(in_pieces, inputs), outputs_and_gradients(gated_delta_rule, inputs), 1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(40, 40, 40), (70, 3, 1, 33), (0, 5, 0, 50), (1, 1, 1)], ids=str)
def test_packed_equals_segments(lengths: tuple[int, ...], backend: str) -> None:
    inputs = random_inputs(sum(lengths), batch=1)
    inputs["initial_state"] = random_inputs(1, batch=len(lengths), seed=1)["initial_state"]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)

    def one_by_one(initial_state: Tensor, **tokens: Tensor) -> tuple[Tensor, Tensor]:
        outputs, finals = [], []
        for n, length in enumerate(lengths):
            start = int(cu_seqlens[n])
            piece = {name: x[:, start : start + length] for name, x in tokens.items()}
            o, final = gated_delta_rule(**piece, initial_state=initial_state[n : n + 1], backend="reference")
            outputs.append(o)
            finals.append(final)
        return torch.cat(outputs, dim=1), torch.cat(finals)

    packed = outputs_and_gradients(partial(gated_delta_rule, cu_seqlens=cu_seqlens, backend=backend), inputs)
    assert_close(packed, outputs_and_gradients(one_by_one, inputs), 1e-11)


@pytest.mark.parametrize("strong", [-30.0, -1e4, -1e30, float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_strong_decay(strong: float, dtype: torch.dtype) -> None:
    inputs = {name: x.to(dtype) for name, x in random_inputs(100).items()}
    inputs["g"][:, ::7] = strong
    inputs["g"][:, 50:70] = strong
    doubled = {name: x.double() for name, x in inputs.items()}
    expected = outputs_and_gradients(partial(gated_delta_rule, backend="reference"), doubled)
    got = outputs_and_gradients(partial(gated_delta_rule, backend="torch"), inputs)
    assert all(x.isfinite().all() for x in got.values())
    vanishing = ("dinitial_state",) if strong < -100 else ()
    assert_close(got, expected, 1e-10 if dtype == torch.float64 else 2e-5, vanishing)


@pytest.mark.parametrize("decay", [-3.0, -12.0, -21.0, -39.0])
def test_gradient_of_a_constant_strong_decay(decay: float) -> None:
    """It is as small as e^decay beside the terms that cancel in it."""
    inputs = {name: x.float() for name, x in random_inputs(70).items()}
    inputs["g"][:] = decay
    expected = outputs_and_gradients(
        partial(gated_delta_rule, backend="reference"), {name: x.double() for name, x in inputs.items()}
    )
    got = outputs_and_gradients(partial(gated_delta_rule, backend="torch"), inputs)
    assert_close(got, expected, 2e-5)


def test_reset_with_long_keys_does_not_overflow() -> None:
    inputs = {name: x.float() for name, x in random_inputs(64).items()}
    inputs["k"] *= 100.0  # without the resets, (1 - beta |k|^2)^64 overflows
    inputs["g"][:] = float("-inf")
    expected = outputs_and_gradients(partial(gated_delta_rule, backend="reference"), inputs)
    got = outputs_and_gradients(partial(gated_delta_rule, backend="torch"), inputs)
    assert all(x.isfinite().all() for x in got.values())
    assert_close(got, expected, 2e-5, ("dg", "dinitial_state"))


def test_no_decay_is_denormal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products with denormal factors take many times longer; the decays between all pairs of tokens are checked."""
    factors = []
    exp = chunked_groups._exp
    monkeypatch.setattr(chunked_groups, "_exp", lambda log: factors.append(exp(log)) or factors[-1])
    inputs = {name: x.float() for name, x in random_inputs(64).items()}
    inputs["g"][:] = -24.0
    gated_delta_rule(**inputs, backend="torch")
    tiny = torch.finfo(torch.float32).tiny
    assert factors
    assert all(((x == 0) | (x >= tiny)).all() for x in factors)


def test_bfloat16_computes_in_float32() -> None:
    inputs = random_inputs(130)
    low = {name: x.bfloat16() for name, x in inputs.items()} | {"g": inputs["g"].float()}
    exact = {name: x.double() for name, x in low.items()}
    got = outputs_and_gradients(gated_delta_rule, low)
    expected = outputs_and_gradients(gated_delta_rule, exact)
    assert got["output"].dtype == torch.bfloat16
    assert got["final"].dtype == torch.float32
    assert relative(got["final"], expected["final"]) < 2e-6
    assert_close(got, expected, 4e-3)  # what rounding the results to bfloat16 costs


@pytest.mark.parametrize("tokens", [2, 70])
def test_autocast_does_not_lower_the_precision(tokens: int) -> None:
    inputs = {name: x.float() for name, x in random_inputs(tokens).items()}
    expected = outputs_and_gradients(gated_delta_rule, inputs)
    with_autocast = torch.autocast("cpu", dtype=torch.bfloat16)(gated_delta_rule)
    assert_close(outputs_and_gradients(with_autocast, inputs), expected, 1e-7)


def test_l2norm_is_differentiated_and_scale_applies() -> None:
    inputs = random_inputs(40)
    inputs["q"], inputs["k"] = inputs["q"] * 3.0, inputs["k"] * 0.2
    expected = outputs_and_gradients(partial(gated_delta_rule, backend="reference", qk_l2norm=True, scale=0.3), inputs)
    assert_close(outputs_and_gradients(partial(gated_delta_rule, qk_l2norm=True, scale=0.3), inputs), expected, 1e-11)
    assert not torch.allclose(expected["output"], gated_delta_rule(**inputs)[0])


@pytest.mark.parametrize("tokens", [3, 4, 5, 32, 40, 130])
def test_flops_are_those_of_the_meta_device(tokens: int) -> None:
    inputs = {name: x.float().to("meta") for name, x in random_inputs(tokens, heads=4, key_heads=2).items()}
    with FlopCounterMode(display=False) as counter:
        o, final = gated_delta_rule(**inputs)
    assert o.shape == (2, tokens, 4, 6)
    assert final.shape == (2, 4, 8, 6)
    assert counter.get_total_flops() == gated_delta_rule_flops(2, tokens, 4, 8, 6)


def test_uninitialised_memory_is_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = random_inputs(75)
    expected = outputs_and_gradients(gated_delta_rule, inputs)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
    try:
        got = outputs_and_gradients(gated_delta_rule, inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(got, expected, 1e-14)


def test_state_is_not_overwritten() -> None:
    inputs = random_inputs(40)
    before = inputs["initial_state"].clone()
    for tokens in (1, 40):
        gated_delta_rule(**{name: x[:, :tokens] if name != "initial_state" else x for name, x in inputs.items()})
        assert torch.equal(inputs["initial_state"], before)


def test_no_tokens_leave_the_state() -> None:
    inputs = random_inputs(0)
    o, final = gated_delta_rule(**inputs)
    assert o.shape == (2, 0, 2, 6)
    assert torch.equal(final, inputs["initial_state"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 9, 2, 8)}, "gated_delta_rule: k has shape (2, 9, 2, 8), expected (B, T, Hk, K)"),
        ({"v": torch.zeros(2, 10, 3, 6)}, "v has 3 heads, expected a multiple of the 2 heads"),
        ({"g": torch.zeros(2, 10, 1)}, "g has shape (2, 10, 1), expected (B, T, H) = (2, 10, 2)"),
        ({"beta": torch.zeros(2, 10)}, "beta has shape (2, 10)"),
        ({"beta": torch.zeros(2, 10, 2, dtype=torch.int64)}, "beta has dtype torch.int64"),
        ({"initial_state": torch.zeros(1, 2, 8, 6)}, "initial_state has shape (1, 2, 8, 6)"),
        ({"cu_seqlens": torch.tensor([0, 10])}, "cu_seqlens needs one packed row, got a batch of 2"),
        ({"backend": "fast"}, "backend 'fast' is unknown; accepted: auto, fla, reference, torch"),
    ],
)
def test_mistakes_are_named(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {name: x.float() for name, x in random_inputs(10).items()}
    with pytest.raises(ConfigError, match=re.escape(message)):
        gated_delta_rule(**(arguments | change))  # type: ignore[arg-type]


@pytest.mark.parametrize("bounds", [[0, 4, 9], [1, 10], [0, 7, 5, 10]], ids=str)
def test_boundaries_must_rise_to_the_end(bounds: list[int]) -> None:
    inputs = random_inputs(10, batch=1, state=False)
    with pytest.raises(ConfigError, match="expected to rise from 0 to the 10 tokens"):
        gated_delta_rule(**inputs, cu_seqlens=torch.tensor(bounds))
