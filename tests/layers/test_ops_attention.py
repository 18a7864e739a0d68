"""Attention against a float64 softmax under a dense mask: windows, heads, padding, packing, caches."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_support import relative
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hybridvl.layers.errors import ConfigError
from hybridvl.layers.ops import attention, banded_attention
from hybridvl.layers.ops.attention import attention_flops

BACKENDS = ("reference", "torch")


def random_inputs(
    queries: int, keys: int | None = None, batch: int = 2, heads: int = 4, kv_heads: int = 2, seed: int = 0
) -> list[Tensor]:
    make = partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    keys = queries if keys is None else keys
    return [make(batch, queries, heads, 8), make(batch, keys, kv_heads, 8), make(batch, keys, kv_heads, 8)]


def by_hand(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float = 8**-0.5) -> Tensor:
    """Head by head, allowed (B, T, S): exponentials over their sum, zero where the sum is empty."""
    group = q.shape[2] // k.shape[2]
    outputs = []
    for head in range(q.shape[2]):
        scores = torch.einsum("btk,bsk->bts", q[:, :, head], k[:, :, head // group]) * scale
        weights = scores.exp() * allowed
        total = weights.sum(-1, keepdim=True)
        weights = weights / torch.where(total == 0, 1, total)
        outputs.append(torch.einsum("bts,bsv->btv", weights, v[:, :, head // group]))
    return torch.stack(outputs, dim=2)


def band(batch: int, queries: int, keys: int, window: int | None) -> Tensor:
    allowed = torch.zeros(batch, queries, keys, dtype=torch.bool)
    for t in range(queries):
        position = keys - queries + t
        first = 0 if window is None else max(position - window + 1, 0)
        allowed[:, t, first : position + 1] = True
    return allowed


def with_gradients(op: object, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output = op(*leaves)  # type: ignore[operator]
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [output, *torch.autograd.grad((output.double() * upstream).sum(), leaves)]


def assert_same(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, a, b in zip(("o", "dq", "dk", "dv"), got, expected, strict=True):
        scale = max(1.0, float(b.detach().abs().max()))  # a softmax over one key has zero gradients
        assert float((a.detach().double() - b.detach().double()).abs().max()) < tolerance * scale, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 3, 64, 100, 300])
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 130, 300])
def test_windows(tokens: int, window: int | None, kv_heads: int, backend: str) -> None:
    inputs = random_inputs(tokens, batch=1, kv_heads=kv_heads)
    got = with_gradients(partial(attention, window=window, backend=backend), inputs)
    allowed = band(1, tokens, tokens, window)
    expected = with_gradients(partial(by_hand, allowed=allowed), inputs)
    assert_same(got, expected, 1e-11)
    if backend == "torch":
        single = with_gradients(partial(attention, window=window), [x.float() for x in inputs])
        assert_same(single, expected, 2e-5)


@settings(max_examples=40, deadline=None)
@given(
    queries=st.integers(1, 150),
    earlier=st.integers(0, 100),
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    window=st.none() | st.integers(1, 200),
    padded=st.booleans(),
    backend=st.sampled_from(BACKENDS),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    queries: int,
    earlier: int,
    batch: int,
    kv_heads: int,
    group: int,
    window: int | None,
    padded: bool,
    backend: str,
    seed: int,
) -> None:
    keys = queries + earlier
    inputs = random_inputs(queries, keys, batch, kv_heads * group, kv_heads, seed)
    allowed = band(batch, queries, keys, window)
    real = None
    if padded:
        real = torch.rand(batch, keys, generator=torch.Generator().manual_seed(seed)) > 0.5
        allowed &= real[:, None]
    got = with_gradients(partial(attention, window=window, key_padding_mask=real, backend=backend), inputs)
    assert_same(got, with_gradients(partial(by_hand, allowed=allowed), inputs), 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 5, 100])
def test_left_padding_equals_no_padding(window: int | None, backend: str) -> None:
    short = random_inputs(70, batch=1)
    junk = random_inputs(13, batch=1, seed=3)
    padded = [torch.cat([a, b], dim=1) for a, b in zip(junk, short, strict=True)]
    real = (torch.arange(83) >= 13)[None]
    got = attention(*padded, window=window, key_padding_mask=real, backend=backend)
    assert relative(got[:, 13:], attention(*short, window=window, backend=backend)) < 1e-12
    assert not got[:, :13].any()  # nothing to see there: zeros


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("lengths", [(20, 20), (70, 1, 9), (0, 5, 0, 30)], ids=str)
def test_packed_equals_segments(lengths: tuple[int, ...], window: int | None, backend: str) -> None:
    inputs = random_inputs(sum(lengths), batch=1)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    allowed = band(1, sum(lengths), sum(lengths), window) & (segment[:, None] == segment)
    got = with_gradients(partial(attention, window=window, cu_seqlens=cu_seqlens, backend=backend), inputs)
    assert_same(got, with_gradients(partial(by_hand, allowed=allowed), inputs), 1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queries", [1, 7])
def test_explicit_mask_replaces_causality(queries: int, backend: str) -> None:
    inputs = random_inputs(queries, 30)
    allowed = torch.rand(2, queries, 30, generator=torch.Generator().manual_seed(2)) > 0.6
    allowed[0, 0] = False  # sees nothing
    got = with_gradients(partial(attention, mask=allowed, backend=backend), inputs)
    assert not got[0][0, 0].any()
    assert not got[1][0, 0].any()
    assert_same(got, with_gradients(partial(by_hand, allowed=allowed), inputs), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_without_keys_are_zero_in_every_dtype(backend: str, dtype: torch.dtype) -> None:
    inputs = [x.to(dtype) for x in random_inputs(80)]
    nothing = torch.zeros(2, 80, dtype=torch.bool)
    results = with_gradients(partial(attention, window=8, key_padding_mask=nothing, backend=backend), inputs)
    assert all(not x.any() for x in results)


@pytest.mark.parametrize("window", [None, 64])
def test_bfloat16_is_near_float64(window: int | None) -> None:
    low = [x.bfloat16() for x in random_inputs(200)]
    got = with_gradients(partial(attention, window=window), low)
    assert got[0].dtype == torch.bfloat16
    assert_same(got, with_gradients(partial(attention, window=window), [x.double() for x in low]), 2e-2)


def sdpa_under_a_mask(allowed: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The peer: one fused call under a dense mask."""
    given = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*given, attn_mask=allowed[:, None], enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (8, 1)])
def test_windowed_errors_are_no_larger_than_those_of_sdpa(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    """Outputs and all gradients, both compared with float64 on the same numbers."""
    low = [x.to(dtype) for x in random_inputs(500, 530, 1, heads, kv_heads, seed=7)]
    allowed = band(1, 500, 530, 90)
    exact = with_gradients(partial(by_hand, allowed=allowed), [x.double() for x in low])
    ours = with_gradients(partial(attention, window=90), low)
    theirs = with_gradients(partial(sdpa_under_a_mask, allowed), low)
    for name, a, b, right in zip(("o", "dq", "dk", "dv"), ours, theirs, exact, strict=True):
        got, peer = (float((x.detach().double() - right.detach()).norm() / right.detach().norm()) for x in (a, b))
        assert got < 1.25 * peer, (name, got, peer)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_processors_with_a_matrix_unit(
    kv_heads: int, padded: bool, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There, bfloat16 blocks go through SDPA; the numbers are the same but for rounding."""
    calls = []
    fused = banded_attention._FusedUnit._fused
    monkeypatch.setattr(banded_attention, "_MATRIX_UNIT", True)
    monkeypatch.setattr(banded_attention._FusedUnit, "_fused", lambda *given: calls.append(1) or fused(*given))
    rows = 1 if packed else 2
    low = [x.bfloat16() for x in random_inputs(300, batch=rows, kv_heads=kv_heads)]
    allowed, options = band(rows, 300, 300, 70), {}
    if padded:
        real = torch.rand(rows, 300, generator=torch.Generator().manual_seed(0)) > 0.9
        options = {"key_padding_mask": real}
        allowed &= real[:, None]
    if packed and not padded:
        bounds = torch.tensor([0, 10, 150, 300])
        options = {"cu_seqlens": bounds}
        allowed &= torch.bucketize(torch.arange(300), bounds, right=True)[:, None].eq(
            torch.bucketize(torch.arange(300), bounds, right=True)
        )
    got = with_gradients(partial(attention, window=70, backend="torch", **options), low)
    assert_same(got, with_gradients(partial(by_hand, allowed=allowed), [x.double() for x in low]), 2e-2)
    assert calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_scratch_may_hold_anything(padded: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is not written first is never read."""
    inputs = [x.to(dtype) for x in random_inputs(150, 170, kv_heads=1)]
    real = torch.rand(2, 170, generator=torch.Generator().manual_seed(0)) > 0.3 if padded else None
    expected = with_gradients(partial(attention, window=20, key_padding_mask=real), inputs)

    def poisoned(self: Tensor, *size: object, **options: object) -> Tensor:
        return self.new_full(size if isinstance(size[0], int) else size[0], torch.nan, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    got = with_gradients(partial(attention, window=20, key_padding_mask=real), inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("window", [None, 40, 600])
def test_packed_segments_short_and_long(window: int | None) -> None:
    """Longer than what is attended side by side, in grouped heads."""
    lengths = (3, 700, 1, 64, 128)
    inputs = random_inputs(sum(lengths), batch=1, heads=4, kv_heads=1)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    allowed = band(1, sum(lengths), sum(lengths), window) & (segment[:, None] == segment)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    got = with_gradients(partial(attention, window=window, cu_seqlens=cu_seqlens, backend="torch"), inputs)
    assert_same(got, with_gradients(partial(by_hand, allowed=allowed), inputs), 1e-11)


_PEAK = """
import resource, sys, torch
from hybridvl.layers.ops import attention, banded_attention
torch.set_num_threads(1)
tokens = int(sys.argv[1])
q, k, v = (torch.randn(1, tokens, heads, 32, requires_grad=True) for heads in (4, 1, 1))
attention(q, k, v, window=128, backend="torch").sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_memory_of_a_window_is_linear() -> None:
    """Peak of a forward and backward pass in a fresh process: inputs, outputs, gradients, no square of the length."""
    peaks = [
        int(subprocess.run([sys.executable, "-c", _PEAK, str(t)], check=True, capture_output=True, text=True).stdout)
        for t in (1 << 13, 1 << 14)
    ]
    row = (4 + 1 + 1) * 32 * 4  # bytes of a token's query, key and value
    # Inputs, outputs and their gradients with room to spare; dense scores of one head alone would be 805 MB more.
    assert peaks[1] - peaks[0] < (1 << 13) * row * 8


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keys", [0, 5])
@pytest.mark.parametrize("window", [None, 4])
def test_no_queries_give_nothing(window: int | None, keys: int, backend: str) -> None:
    real = torch.ones(2, keys, dtype=torch.bool)
    for mask in (None, real):
        got = attention(*random_inputs(0, keys), window=window, key_padding_mask=mask, backend=backend)
        assert got.shape == (2, 0, 4, 8)


def test_scale_and_value_dim() -> None:
    q, k, _ = random_inputs(70)
    v = torch.randn(2, 70, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for window in (None, 10):
        got = attention(q, k, v, window=window, scale=0.7)
        assert relative(got, by_hand(q, k, v, band(2, 70, 70, window), scale=0.7)) < 1e-12


@pytest.mark.parametrize("window", [16, 100, 512])
def test_windowed_time_is_linear(window: int) -> None:
    """Operations grow with T, not T^2, and stay near those of the pairs that are needed."""
    short, long = (attention_flops(1, tokens, tokens, 4, 8, 8, window) for tokens in (4096, 8192))
    assert long < 2.1 * short
    needed = 2 * 4 * 8192 * window * 16
    assert long < needed * (1 + max(window, 64) / window)


@pytest.mark.parametrize("window", [None, 16, 100])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (70, 70), (300, 300), (10, 200)])
def test_flops_are_those_of_the_meta_device(queries: int, keys: int, window: int | None) -> None:
    inputs = [x.float().to("meta") for x in random_inputs(queries, keys)]
    with FlopCounterMode(display=False) as counter:
        assert attention(*inputs, window=window).shape == (2, queries, 4, 8)
    assert counter.get_total_flops() == attention_flops(2, queries, keys, 4, 8, 8, window)


def test_autocast_runs_and_keeps_the_dtype() -> None:
    inputs = [x.float() for x in random_inputs(80)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = attention(*inputs, window=10)
    assert got.dtype == torch.float32
    assert relative(got, attention(*inputs, window=10)) < 2e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 10, 2, 7)}, "attention: k has shape (2, 10, 2, 7), expected (B, S, Hkv, K)"),
        ({"v": torch.zeros(2, 9, 2, 8)}, "v has shape (2, 9, 2, 8), expected (B, S, Hkv, V) = (2, 10, 2, any)"),
        ({"k": torch.zeros(2, 10, 3, 8), "v": torch.zeros(2, 10, 3, 8)}, "q has 4 heads, expected a multiple of the 3"),
        ({"window": 0}, "window is 0, expected None or at least 1"),
        ({"window": -3}, "window is -3"),
        ({"q": torch.zeros(2, 11, 4, 8)}, "k has 10 positions, expected at least the 11 of q"),
        ({"key_padding_mask": torch.ones(2, 9).bool()}, "key_padding_mask has shape (2, 9), expected (B, S) = (2, 10)"),
        ({"key_padding_mask": torch.ones(2, 10)}, "key_padding_mask has dtype torch.float32, expected torch.bool"),
        ({"mask": torch.ones(2, 10, 9).bool()}, "mask has shape (2, 10, 9), expected (B, T, S) = (2, 10, 10)"),
        ({"mask": torch.ones(2, 10, 10).bool(), "window": 3}, "mask stands instead of window"),
        ({"cu_seqlens": torch.tensor([0, 10])}, "cu_seqlens needs one packed row, got a batch of 2"),
    ],
)
def test_mistakes_are_named(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = dict(zip("qkv", (x.float() for x in random_inputs(10)), strict=True))
    with pytest.raises(ConfigError, match=re.escape(message)):
        attention(**(arguments | change))  # type: ignore[arg-type]
