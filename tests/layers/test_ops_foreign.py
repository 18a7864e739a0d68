"""Kernels of others behind the operators: SDPA and FlexAttention against the reference, the rest by stand-ins with the
signatures of their packages, since those need a GPU."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from hybridvl.layers.errors import ConfigError
from hybridvl.layers.ops import attention, ssd
from hybridvl.layers.ops.kernels import flash, flex

BOUNDS = torch.tensor([0, 13, 14, 40])
CASES = {
    "plain": {},
    "window": {"window": 7},
    "wide window": {"window": 100},
    "more keys": {"keys": 61, "window": 20},
    "packed": {"cu_seqlens": BOUNDS},
    "packed window": {"cu_seqlens": BOUNDS, "window": 5},
}


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def inputs(keys: int = 40, value_dim: int = 8) -> list[Tensor]:
    rows = 1
    return [draw(rows, 40, 6, 8, seed=1), draw(rows, keys, 2, 8, seed=2), draw(rows, keys, 2, value_dim, seed=3)]


def assert_same(found: Callable[..., Tensor], leaves: list[Tensor], **options: object) -> None:
    """Output and gradients of a path and of the reference."""
    results = []
    for run in (found, lambda *given, **rest: attention(*given, **rest, backend="reference")):
        o = run(*leaves, **options)
        results.append([o, *torch.autograd.grad(o.square().sum(), leaves)])
    for mine, right in zip(*results, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_sdpa(options: dict) -> None:
    options = dict(options)
    leaves = inputs(options.pop("keys", 40), value_dim=5)
    assert_same(lambda *given, **rest: attention(*given, **rest, backend="sdpa"), leaves, **options)


def test_sdpa_under_masks() -> None:
    q, k, v = draw(3, 9, 4, 8, seed=1), draw(3, 12, 2, 8, seed=2), draw(3, 12, 2, 8, seed=3)
    real = torch.arange(12) >= torch.tensor([0, 5, 12])[:, None]  # a row without any key gives zeros
    mask = torch.rand(3, 9, 12, generator=torch.Generator().manual_seed(0)) > 0.6
    for options in ({"key_padding_mask": real}, {"key_padding_mask": real, "window": 3}, {"mask": mask}):
        assert_same(lambda *given, **rest: attention(*given, **rest, backend="sdpa"), [q, k, v], **options)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_flex(options: dict) -> None:
    """Forward: FlexAttention has no backward pass on a CPU."""
    options = dict(options)
    q, k, v = (x.detach() for x in inputs(options.pop("keys", 40), value_dim=5))
    right = attention(q, k, v, **options, backend="reference")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not compiled
        found = flex.attention(q, k, v, options.get("window"), q.shape[-1] ** -0.5, options.get("cu_seqlens"))
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9)


def test_flex_masks_are_made_once_for_all_layers() -> None:
    given = (100, 100, 30, (0, 40, 100), torch.device("cpu"))
    assert flex._block_mask(*given) is flex._block_mask(*given)


def banded(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: tuple[int, int]) -> Tensor:
    """What flash-attn documents: causal is bottom-right aligned, a query at p sees keys p - left to p + right."""
    position = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None]
    key = torch.arange(k.shape[1])
    left, right = (k.shape[1] if size < 0 else size for size in window)
    seen = (key >= position - left) & (key <= position + (0 if causal else right))
    return attention(q, k, v, scale=scale, mask=seen.expand(q.shape[0], -1, -1), backend="reference")


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    return banded(q, k, v, softmax_scale, causal, window_size)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    parts = []
    for start, stop in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
        row = [x[None, start:stop] for x in (q, k, v)]
        parts.append(banded(*row, softmax_scale, causal, window_size)[0])
    return torch.cat(parts)


@pytest.fixture
def _flash_attn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    package = types.ModuleType("flash_attn")
    package.flash_attn_func, package.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    flash._functions.cache_clear()
    yield
    flash._functions.cache_clear()


@pytest.mark.usefixtures("_flash_attn")
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_flash_attn_is_asked_for_the_same(options: dict) -> None:
    options = dict(options)
    leaves = inputs(options.pop("keys", 40))

    def run(q: Tensor, k: Tensor, v: Tensor, window: int | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        return flash.attention(q, k, v, window, q.shape[-1] ** -0.5, cu_seqlens)

    assert_same(run, leaves, **options)


@pytest.mark.parametrize(
    ("capability", "present", "expected"),
    [
        (9, ("flash_attn", "flash_attn.cute"), "flash_attn"),
        (10, ("flash_attn", "flash_attn.cute"), "flash_attn.cute"),
        (10, ("flash_attn",), "flash_attn"),
        (9, ("flash_attn.cute",), "flash_attn.cute"),
    ],
)
def test_the_version_of_flash_attn(
    capability: int, present: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("flash_attn", "flash_attn.cute"):
        module = types.ModuleType(name)
        if name in present:
            module.flash_attn_func, module.flash_attn_varlen_func = lambda name=name: (name, "lse"), None
        monkeypatch.setitem(sys.modules, name, module if name in present or name == "flash_attn" else None)
    flash._functions.cache_clear()
    chosen, _ = flash._functions(capability)
    flash._functions.cache_clear()
    assert flash._first(chosen()) == expected


def test_flash_attn_without_its_functions_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    flash._functions.cache_clear()
    with pytest.raises(ImportError, match=r"neither it nor flash_attn\.cute"):
        flash._functions(9)


def test_fla_gets_the_state_space_recurrence_as_linear_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with fla's signature: S = e^g S + k v^T, o = scale q S, with S (N, H, K, V)."""

    def chunk_simple_gla(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        scale: float | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert output_final_state
        assert q.shape[2] == v.shape[2]
        bounds = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
        state = (
            torch.zeros(len(bounds) - 1, q.shape[2], q.shape[3], v.shape[3]) if initial_state is None else initial_state
        )
        state, outputs = state.clone(), []
        for row in range(len(bounds) - 1):
            for t in range(bounds[row], bounds[row + 1]):
                state[row] = state[row] * g[0, t].exp()[:, None, None] + k[0, t, :, :, None] * v[0, t, :, None]
                outputs.append(scale * (q[0, t, :, None] @ state[row]).squeeze(1))
        return torch.stack(outputs)[None], state

    module = types.ModuleType("fla.ops.simple_gla")
    module.chunk_simple_gla = chunk_simple_gla
    monkeypatch.setitem(sys.modules, "fla.ops.simple_gla", module)
    monkeypatch.setattr(sys.modules["hybridvl.layers.ops.ssd"], "resolve_backend", lambda op, name, *_, packed: name)
    x, b, c = (torch.randn(1, 40, *sizes) for sizes in ((4, 6), (2, 5), (2, 5)))
    dt, rates, skip, state = torch.rand(1, 40, 4), -torch.rand(4), torch.randn(4), torch.randn(3, 4, 6, 5)
    for options in ({"cu_seqlens": BOUNDS, "initial_state": state}, {"D": skip}):
        results = [ssd(x, dt, rates, b, c, **options, backend=name) for name in ("fla", "reference")]
        for found, right in zip(*results, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


def test_the_environment_chooses_for_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.detach() for x in inputs())
    monkeypatch.setenv("HYBRIDVL_BACKEND", "attention=flash_attn")
    with pytest.raises(
        ConfigError, match="HYBRIDVL_BACKEND: attention 'flash_attn' cannot be used: its kernels need CUDA"
    ):
        attention(q, k, v)
    monkeypatch.setenv("HYBRIDVL_BACKEND", "sdpa")
    torch.testing.assert_close(attention(q, k, v), attention(q, k, v, backend="reference"))
