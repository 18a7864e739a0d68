"""Which backend an operator takes: by argument, by environment, by what the machine has; and what compiling needs."""

from __future__ import annotations

import re
import sys
import types

import pytest
import torch
from torch import Tensor

from hybridvl.layers.errors import ConfigError
from hybridvl.layers.ops import attention, causal_conv, gated_delta_rule, ssd
from hybridvl.layers.ops.backend import backend_names, backends_report, resolve_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OPS = ("gated_delta_rule", "ssd", "causal_conv", "attention")
MORE = ("ring_attention", "gated_delta_net_step", "mamba2_step", "gated_rms_norm")


@pytest.fixture(autouse=True)
def _no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYBRIDVL_BACKEND", raising=False)


@pytest.fixture
def _fla_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridvl.layers.ops.backend._INSTALLED", frozenset({"fla", "triton"}))


@pytest.mark.parametrize("op", OPS + MORE)
def test_auto_is_torch_on_a_cpu(op: str) -> None:
    assert resolve_backend(op, "auto", CPU) == "torch"
    assert {"auto", "torch", "reference"} <= set(backend_names(op))


@pytest.mark.usefixtures("_fla_installed")
def test_installed_fla_is_taken_on_cuda_only() -> None:
    assert resolve_backend("gated_delta_rule", "auto", CUDA) == "fla"
    assert resolve_backend("gated_delta_rule", "auto", CPU) == "torch"
    assert resolve_backend("ssd", "auto", CUDA) == "torch"


@pytest.mark.usefixtures("_fla_installed")
@pytest.mark.parametrize(
    ("dtype", "key_dim", "reason"),
    [(torch.float32, 128, "take bfloat16 and float16, not torch.float32"), (torch.bfloat16, 512, "up to 256, not 512")],
)
def test_fla_is_passed_over_for_what_it_cannot_take(dtype: torch.dtype, key_dim: int, reason: str) -> None:
    assert resolve_backend("gated_delta_rule", "auto", CUDA, dtype, key_dim) == "torch"
    with pytest.raises(ConfigError, match=reason):
        resolve_backend("gated_delta_rule", "fla", CUDA, dtype, key_dim)


def test_fla_that_is_missing_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridvl.layers.ops.backend._INSTALLED", frozenset())
    assert resolve_backend("gated_delta_rule", "auto", CUDA) == "torch"
    with pytest.raises(ConfigError, match=r"backend 'fla' cannot be used: triton and fla not installed"):
        resolve_backend("gated_delta_rule", "fla", CUDA)


@pytest.mark.usefixtures("_fla_installed")
def test_unusable_explicit_choice_says_why() -> None:
    with pytest.raises(ConfigError, match=r"'fla' cannot be used: .* CUDA tensors, these are on 'cpu'"):
        resolve_backend("gated_delta_rule", "fla", CPU)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("reference", ["reference"] * 4),
        ("auto", ["torch"] * 4),
        (" ", ["torch"] * 4),
        ("ssd=reference, attention=torch", ["torch", "reference", "torch", "torch"]),
        ("gated_delta_rule=reference,causal_conv=reference", ["reference", "torch", "reference", "torch"]),
        ("ssd=auto", ["torch"] * 4),
    ],
)
def test_environment(text: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDVL_BACKEND", text)
    assert [resolve_backend(op, "auto", CPU) for op in OPS] == expected


def test_argument_beats_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDVL_BACKEND", "reference")
    assert resolve_backend("ssd", "torch", CPU) == "torch"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fast", "HYBRIDVL_BACKEND='fast' is unknown; accepted: auto, fla, reference, torch"),
        ("conv=torch", "'conv=torch' is not OPERATOR=BACKEND; operators: gated_delta_rule, ssd, causal_conv"),
        ("ssd=torch,reference", "'reference' is not OPERATOR=BACKEND"),
        ("ssd=fast", "HYBRIDVL_BACKEND: ssd 'fast' is unknown"),
    ],
)
def test_mistakes_in_the_environment(text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDVL_BACKEND", text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        resolve_backend("ssd", "auto", CPU)


def test_unusable_choice_of_the_environment_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDVL_BACKEND", "fla")
    with pytest.raises(ConfigError, match=r"HYBRIDVL_BACKEND: gated_delta_rule 'fla' cannot be used"):
        resolve_backend("gated_delta_rule", "auto", CPU)
    assert resolve_backend("ssd", "auto", CPU) == "torch"  # has no such backend, so nothing was asked of it


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_environment_reaches_the_operators(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDVL_BACKEND", backend)
    calls = []
    module = sys.modules["hybridvl.layers.ops.ssd"]
    original = getattr(module, f"_{backend}")
    monkeypatch.setattr(module, f"_{backend}", lambda *given: calls.append(backend) or original(*given))
    ssd(torch.zeros(1, 9, 1, 2), torch.ones(1, 9, 1), -torch.ones(1), torch.ones(1, 9, 1, 2), torch.ones(1, 9, 1, 2))
    assert calls == [backend]


def test_report_names_every_backend_once() -> None:
    rows = backends_report()
    assert {row.op for row in rows} == set(OPS + MORE)
    assert [row.backend for row in rows if row.chosen] == ["torch"] * len(OPS + MORE)
    (fla,) = (row for row in rows if row.backend == "fla")
    assert not fla.usable
    assert "CUDA" in fla.reason
    assert all(row.reason == "" for row in rows if row.usable)


def test_fla_gets_repeated_heads_and_all_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with fla's signature, itself computed by the reference."""
    seen: dict[str, object] = {}

    def chunk_gated_delta_rule(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        scale: float | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        seen.update(heads=q.shape[2], state=initial_state, wants_state=output_final_state)
        return gated_delta_rule(
            q, k, v, g, beta, initial_state, scale, use_qk_l2norm_in_kernel, cu_seqlens, backend="reference"
        )

    module = types.ModuleType("fla.ops.gated_delta_rule")
    module.chunk_gated_delta_rule = chunk_gated_delta_rule  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", module)
    monkeypatch.setattr(
        sys.modules["hybridvl.layers.ops.gated_delta_rule"],
        "resolve_backend",
        lambda op, requested, *workload: requested,
    )
    q, k, v = torch.randn(1, 40, 2, 4), torch.randn(1, 40, 2, 4), torch.randn(1, 40, 4, 4)
    g, beta, state = -torch.rand(1, 40, 4), torch.rand(1, 40, 4), torch.randn(2, 4, 4, 4)
    cu_seqlens = torch.tensor([0, 30, 40])
    results = [
        gated_delta_rule(q, k, v, g, beta, state, 0.3, True, cu_seqlens, backend=name) for name in ("fla", "torch")
    ]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert seen["heads"] == 4
    assert seen["wants_state"] is True


def test_compiled_operators_equal_eager_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 40, 2, 8, generator=generator).requires_grad_() for _ in range(3))
    g, beta = -torch.rand(1, 40, 2, generator=generator), torch.rand(1, 40, 2, generator=generator)
    weight = torch.randn(16, 4, generator=generator)

    def everything(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed, _ = causal_conv(q.flatten(2), weight)
        rule, _ = gated_delta_rule(mixed.view(q.shape), k, v, g, beta, qk_l2norm=True)
        space, _ = ssd(rule, beta, -torch.ones(2), k, q)
        return space + attention(q, k, v, window=20)

    compiled = torch.compile(everything, backend="aot_eager", fullgraph=True)
    results = []
    for function in (everything, compiled):
        y = function(q, k, v)
        results.append([y, *torch.autograd.grad(y.square().sum(), (q, k, v))])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-4)
