"""Attention of new tokens to a ring and to a cache against a float64 softmax over the tokens written out in a row."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_support import relative
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hybridvl.layers.cache import KeyValueState, zero_slots
from hybridvl.layers.errors import ConfigError
from hybridvl.layers.ops import attention
from hybridvl.layers.ops.ring_attention import cached_attention, ring_attention, ring_attention_flops

BACKENDS = ("reference", "torch")
HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 8, 6


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def history(lengths: list[int], tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q of the new tokens (B, T, H, K); keys and values of all tokens, earlier and new (B, longest + T, Hkv, .)."""
    rows, total = len(lengths), max(lengths) + tokens
    q = draw(rows, tokens, HEADS, DIM, seed=seed)
    return q, draw(rows, total, KV_HEADS, DIM, seed=seed + 1), draw(rows, total, KV_HEADS, VALUE_DIM, seed=seed + 2)


def alone(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], window: int | None) -> Tensor:
    """Row by row over exactly its own tokens, by the reference of plain attention."""
    tokens = q.shape[1]
    rows = [
        attention(q[b : b + 1], *(x[b : b + 1, : n + tokens] for x in (k, v)), window=window, backend="reference")
        for b, n in enumerate(lengths)
    ]
    return torch.cat(rows)


def in_ring(x: Tensor, lengths: list[int], window: int) -> Tensor:
    """The last `window` of each row's earlier tokens in their slots, differentiable."""
    rows = []
    for b, length in enumerate(lengths):
        slots = [x.new_zeros(x.shape[2:])] * window
        for position in range(max(length - window, 0), length):
            slots[position % window] = x[b, position]
        rows.append(torch.stack(slots))
    return torch.stack(rows)


def new(x: Tensor, lengths: list[int], tokens: int) -> Tensor:
    return torch.stack([x[b, n : n + tokens] for b, n in enumerate(lengths)])


def by_ring(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], window: int, backend: str, dtype: torch.dtype = torch.float64
) -> Tensor:
    tokens = q.shape[1]
    given = (new(k, lengths, tokens), new(v, lengths, tokens), in_ring(k, lengths, window), in_ring(v, lengths, window))
    return ring_attention(*(x.to(dtype) for x in (q, *given)), torch.tensor(lengths), backend=backend)


def by_cache(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], spare: int, backend: str) -> Tensor:
    """Slots in the order of the tokens, zeros after each row's own."""
    own = torch.arange(k.shape[1]) < torch.tensor(lengths)[:, None] + q.shape[1]
    slots = [torch.where(own[..., None, None], x, 0) for x in (k, v)]
    slots = [torch.cat((x, x.new_zeros(x.shape[0], spare, *x.shape[2:])), dim=1) for x in slots]
    return cached_attention(q, *slots, torch.tensor(lengths), backend=backend)


def with_gradients(op: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output = op(*leaves)
    upstream = draw(*output.shape, seed=9)
    return [output, *torch.autograd.grad((output.double() * upstream).sum(), leaves)]


def assert_same(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, a, b in zip(("o", "dq", "dk", "dv"), got, expected, strict=True):
        error = float((a.detach().double() - b.detach()).abs().max()) / max(1.0, float(b.detach().abs().max()))
        assert error < tolerance, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[0], [3], [7], [8], [21, 21], [0, 5], [9, 30, 2], [8, 16]], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 40])
@pytest.mark.parametrize("window", [1, 8])
def test_ring(window: int, tokens: int, lengths: list[int], backend: str) -> None:
    """Empty, partly full, wrapped; rows of one and of several lengths; chunks shorter and longer than the ring."""
    inputs = history(lengths, tokens)
    got = with_gradients(lambda q, k, v: by_ring(q, k, v, lengths, window, backend), inputs)
    assert_same(got, with_gradients(lambda q, k, v: alone(q, k, v, lengths, window), inputs), 1e-12)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=3),
    tokens=st.integers(1, 200),
    window=st.integers(1, 150),
    seed=st.integers(0, 1000),
)
def test_any_ring(lengths: list[int], tokens: int, window: int, seed: int) -> None:
    q, k, v = history(lengths, tokens, seed)
    expected = alone(q, k, v, lengths, window)
    assert relative(by_ring(q, k, v, lengths, window, "torch"), expected) < 1e-12
    assert relative(by_ring(q, k, v, lengths, window, "torch", torch.float32), expected) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[0], [63], [64], [100, 100], [0, 5], [90, 130, 2]], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 65])
@pytest.mark.parametrize("spare", [0, 13])
def test_cache(spare: int, tokens: int, lengths: list[int], backend: str) -> None:
    inputs = history(lengths, tokens)
    got = with_gradients(lambda q, k, v: by_cache(q, k, v, lengths, spare, backend), inputs)
    assert_same(got, with_gradients(lambda q, k, v: alone(q, k, v, lengths, None), inputs), 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[3, 3], [12, 12], [30, 4]], ids=str)
def test_single_token_in_the_ring(lengths: list[int], backend: str) -> None:
    """Once written, the token is one of the ring's, whose order does not matter."""
    q, k, v = history(lengths, 1)
    after = [n + 1 for n in lengths]
    got = cached_attention(q, in_ring(k, after, 8), in_ring(v, after, 8), torch.tensor(lengths), backend=backend)
    assert relative(got, alone(q, k, v, lengths, 8)) < 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_beyond_the_slots_see_all(backend: str) -> None:
    """Padding of a chunk for which a full cache made no room: finite, and the others are not disturbed."""
    q, k, v = history([6], 5)
    got = cached_attention(q, k[:, :8], v[:, :8], torch.tensor([6]), backend=backend)
    assert relative(got[:, :2], alone(q[:, :2], k[:, :8], v[:, :8], [6], None)) < 1e-13
    everything = torch.ones(1, 3, 8, dtype=torch.bool)
    assert relative(got[:, 2:], attention(q[:, 2:], k[:, :8], v[:, :8], mask=everything, backend="reference")) < 1e-13


@pytest.mark.parametrize("ragged", [False, True])
def test_slots_not_yet_written_are_not_read(ragged: bool) -> None:
    """What lies beyond the longest row's tokens may be anything."""
    lengths = [5, 3] if ragged else [5, 5]
    q, k, v = history(lengths, 1)
    junk = [torch.cat((x, torch.full_like(x, torch.nan)), dim=1) for x in (k, v)]
    got = cached_attention(q, *junk, torch.tensor(lengths))
    assert relative(got, alone(q, k, v, lengths, None)) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_dtypes_are_as_exact_as_sdpa(dtype: torch.dtype) -> None:
    """Against SDPA under a dense mask over the same numbers, both compared with float64."""
    lengths, tokens, window = [500], 300, 128
    q, k, v = (x.to(dtype) for x in history(lengths, tokens))
    v = torch.cat((v, v[..., :2]), dim=-1)
    exact = alone(q.double(), k.double(), v.double(), lengths, window)
    position, key = torch.arange(500, 800)[:, None], torch.arange(800)
    mask = (key <= position) & (key > position - window)
    peer = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, enable_gqa=True
    ).transpose(1, 2)
    got = by_ring(q, k, v, lengths, window, "torch", dtype)
    assert got.dtype == dtype
    ours, theirs = (float((x.double() - exact).norm()) for x in (got, peer))
    assert ours < 1.1 * theirs


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 4])
def test_caches_of_another_dtype(tokens: int, cache_dtype: torch.dtype) -> None:
    q, k, v = history([9], tokens)
    k, v = k.to(cache_dtype), v.to(cache_dtype)
    queries = q.to(torch.bfloat16 if cache_dtype == torch.float32 else torch.float32)
    got = cached_attention(queries, k, v, torch.tensor([9]))
    assert got.dtype == queries.dtype
    assert relative(got, alone(queries.double(), k.double(), v.double(), [9], None)) < 1e-2


@pytest.mark.parametrize("window", [16, 100])
@pytest.mark.parametrize(("tokens", "context"), [(2, 5), (70, 5), (70, 500), (300, 64)])
def test_flops_are_counted(tokens: int, context: int, window: int) -> None:
    q, k, v = (x.float() for x in history([context], tokens))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        by_ring(q, k, v, [context], window, "torch", torch.float32)
    assert counter.get_total_flops() == ring_attention_flops(1, tokens, context, HEADS, DIM, VALUE_DIM, window)


def test_time_and_scratch_of_a_chunk_are_linear() -> None:
    """Operations of a chunk grow with T, however long the context."""
    short, long = (ring_attention_flops(1, tokens, 10**6, 4, 8, 8, 512) for tokens in (4096, 8192))
    assert long < 2.1 * short
    assert ring_attention_flops(1, 64, 10**6, 4, 8, 8, 512) == ring_attention_flops(1, 64, 511, 4, 8, 8, 512)


def test_ring_of_a_state_carries_gradients() -> None:
    """Chunks through a state in place of one pass: the same gradients of every key and value."""
    _, k, v = history([0], 40)
    q = draw(1, 40, HEADS, DIM, seed=5)

    def chunked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state = KeyValueState(
            zero_slots(1, 8, KV_HEADS, DIM, None, q.dtype),
            zero_slots(1, 8, KV_HEADS, VALUE_DIM, None, q.dtype),
            torch.zeros(1, dtype=torch.int64),
        )
        outputs = []
        for x, y, z in zip(*(t.split([3, 20, 1, 5, 11], dim=1) for t in (q, k, v)), strict=True):
            outputs.append(ring_attention(x, y, z, state.k.clone(), state.v.clone(), state.length))
            state.append(y, z, torch.tensor([y.shape[1]]))
        return torch.cat(outputs, dim=1)

    expected = with_gradients(lambda q, k, v: alone(q, k, v, [0], 8), (q, k, v))
    assert_same(with_gradients(chunked, (q, k, v)), expected, 1e-12)


def test_slots_of_a_head_lie_together() -> None:
    slots = zero_slots(2, 5, 3, 4, None, torch.float32)
    assert slots.shape == (2, 5, 3, 4)
    assert slots.transpose(1, 2).is_contiguous()
    assert not slots.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ring_k": torch.zeros(1, 4, 2, 7)}, "ring_attention: the cache of keys has shape (1, 4, 2, 7)"),
        ({"ring_v": torch.zeros(1, 5, 2, 6)}, "the cache of values has shape (1, 5, 2, 6), expected (B, S, Hkv, V)"),
        ({"k": torch.zeros(1, 3, 1, 8)}, "ring_attention: k has shape (1, 3, 1, 8), expected (B, T, Hkv, K)"),
        ({"v": torch.zeros(1, 2, 2, 6)}, "ring_attention: v has shape (1, 2, 2, 6), expected (B, T, Hkv, V)"),
        ({"length": torch.zeros(2, dtype=torch.int64)}, "length has shape (2,), expected (B,) = (1)"),
        ({"q": torch.zeros(1, 3, 3, 8)}, "q has 3 heads, expected a multiple of the 2 heads of the cache"),
        ({"ring_k": torch.zeros(1, 0, 2, 8), "ring_v": torch.zeros(1, 0, 2, 6)}, "the cache has no slots"),
    ],
)
def test_mistakes_are_named(change: dict[str, Tensor], message: str) -> None:
    arguments = {
        "q": torch.zeros(1, 3, 4, 8),
        "k": torch.zeros(1, 3, 2, 8),
        "v": torch.zeros(1, 3, 2, 6),
        "ring_k": torch.zeros(1, 4, 2, 8),
        "ring_v": torch.zeros(1, 4, 2, 6),
        "length": torch.zeros(1, dtype=torch.int64),
    }
    with pytest.raises(ConfigError, match=re.escape(message)):
        ring_attention(**(arguments | change))
