"""Which backend an operator takes: by argument, by environment, by what the machine has; and what compiling needs."""

from __future__ import annotations

import re
import sys
import types

import pytest
import torch
from torch import Tensor

from hybridvl.layers import MIXERS, Sequence
from hybridvl.layers.errors import ConfigError
from hybridvl.layers.ops import attention, causal_conv, gated_delta_rule, ssd
from hybridvl.layers.ops.backend import backend_names, backend_or_auto, backends_report, resolve_backend, usable_or_auto

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OPS = (
    "gated_delta_rule",
    "ssd",
    "causal_conv",
    "attention",
    "ring_attention",
    "gated_delta_net_step",
    "mamba2_step",
    "gated_rms_norm",
    "rms_norm",
    "rotary",
    "store_in_slots",
    "swiglu",
)
ALL = {"auto", "fla", "flash_attn", "flex", "reference", "sdpa", "torch", "triton"}
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYBRIDVL_BACKEND", raising=False)


@pytest.fixture
def _fla_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridvl.layers.ops.backend._INSTALLED", frozenset({"fla", "triton"}))


@pytest.fixture
def _all_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridvl.layers.ops.backend._INSTALLED", frozenset({"fla", "triton", "flash_attn"}))


@pytest.fixture(autouse=True)
def _compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridvl.layers.ops.backend._INTERPRETED", False)


@pytest.mark.parametrize("op", OPS)
def test_auto_is_torch_on_a_cpu(op: str) -> None:
    assert resolve_backend(op, "auto", CPU) == "torch"
    assert {"auto", "torch", "reference"} <= set(backend_names(op))


@pytest.mark.usefixtures("_fla_installed")
def test_installed_fla_is_taken_on_cuda_only() -> None:
    assert resolve_backend("gated_delta_rule", "auto", CUDA) == "fla"
    assert resolve_backend("gated_delta_rule", "auto", CPU) == "torch"
    assert resolve_backend("ssd", "auto", CUDA) == "fla"
    assert resolve_backend("ssd", "auto", CPU) == "torch"
    assert resolve_backend("causal_conv", "auto", CUDA, grad=True) == "torch"


@pytest.mark.usefixtures("_all_installed")
def test_kernels_of_our_own_are_taken_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in ("ring_attention", "store_in_slots", "gated_delta_net_step", "mamba2_step"):
        assert resolve_backend(op, "auto", CUDA, BF16, 128) == "triton"
        assert resolve_backend(op, "auto", CPU, BF16, 128) == "torch"
        assert resolve_backend(op, "auto", CUDA, torch.float64, 128) == "torch"
        assert resolve_backend(op, "auto", CUDA, BF16, 128, grad=True) == "torch"
        with pytest.raises(ConfigError, match=f"{op}: backend 'triton' cannot be used: .* no backward pass"):
            resolve_backend(op, "triton", CUDA, BF16, 128, grad=True)
    for op in ("causal_conv", "rotary", "store_in_slots", "swiglu", "rms_norm"):
        assert resolve_backend(op, "auto", CUDA, BF16, 128) == "triton"
        with monkeypatch.context() as patch:
            patch.setattr("torch.compiler.is_compiling", lambda: True)
            assert resolve_backend(op, "auto", CUDA, BF16, 128) == "torch"
    assert resolve_backend("causal_conv", "auto", CUDA, BF16, packed=True) == "torch"
    with pytest.raises(ConfigError, match=r"causal_conv: backend 'triton' cannot be used: .* no packed segments"):
        resolve_backend("causal_conv", "triton", CUDA, BF16, packed=True)
    for op in ("rotary", "rms_norm"):
        assert resolve_backend(op, "auto", CUDA, BF16, 128, grad=True) == "triton"
    assert resolve_backend("gated_rms_norm", "auto", CUDA, BF16, 4096, grad=True) == "triton"
    assert resolve_backend("gated_rms_norm", "auto", CUDA, BF16, 1 << 15) == "torch"


@pytest.mark.usefixtures("_all_installed")
@pytest.mark.parametrize(
    ("tokens", "options", "expected"),
    [
        (4096, {}, "flash_attn"),
        (4096, {"windowed": True, "grad": True}, "flash_attn"),
        (4096, {"packed": True}, "flash_attn"),
        (4096, {"value_dim": 256, "windowed": True}, "flex"),
        (512, {"value_dim": 256, "windowed": True}, "torch"),
        (4096, {"value_dim": 256, "packed": True}, "flex"),
        (4096, {"value_dim": 256}, "sdpa"),
        (4096, {"value_dim": 512}, "sdpa"),
        (4096, {"dtype": torch.float32}, "sdpa"),
        (4096, {"dtype": torch.float32, "windowed": True}, "flex"),
        (4096, {"dtype": torch.float64, "windowed": True}, "torch"),
        (4096, {"masked": True}, "sdpa"),
        (4096, {"masked": True, "windowed": True}, "torch"),
        (4096, {"device": CPU}, "torch"),
    ],
)
def test_attention_is_chosen_by_shape(tokens: int, options: dict, expected: str) -> None:
    given = {"device": CUDA, "dtype": BF16, "key_dim": 128, "value_dim": 128, **options}
    assert resolve_backend("attention", "auto", tokens=tokens, **given) == expected


@pytest.mark.usefixtures("_all_installed")
@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("flash_attn", {"dtype": torch.float32}, "take bfloat16 and float16, not torch.float32"),
        ("flash_attn", {"device": CPU}, "its kernels need CUDA tensors, these are on 'cpu'"),
        ("flash_attn", {"value_dim": 64}, "values as wide as keys, not 64 beside 128"),
        ("flash_attn", {"masked": True}, "take no mask of the keys"),
        ("flash_attn", {"key_dim": 512}, "key and value dims up to 256, not 512"),
        ("flex", {"dtype": torch.float64}, "take bfloat16, float16 and float32, not torch.float64"),
        ("flex", {"masked": True}, "its Triton kernels take no mask"),
        ("flex", {"device": CPU}, "its Triton kernels need CUDA tensors"),
    ],
)
def test_attention_says_why_not(name: str, options: dict, reason: str) -> None:
    given = {"device": CUDA, "dtype": BF16, "key_dim": 128, **options}
    with pytest.raises(ConfigError, match=f"attention: backend {name!r} cannot be used: .*{reason}"):
        resolve_backend("attention", name, **given)


def test_interpreted_kernels_run_on_a_cpu_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridvl.layers.ops.backend._INSTALLED", frozenset({"triton", "fla"}))
    monkeypatch.setattr("hybridvl.layers.ops.backend._INTERPRETED", True)
    assert resolve_backend("gated_rms_norm", "triton", CPU) == "triton"
    assert resolve_backend("gated_rms_norm", "auto", CPU) == "torch"
    with pytest.raises(ConfigError, match="CUDA tensors"):
        resolve_backend("gated_delta_rule", "fla", CPU)


def test_a_mixer_passes_on_what_its_operators_have() -> None:
    assert backend_or_auto("gated_delta_net_step", "triton") == "triton"
    assert backend_or_auto("gated_delta_net_step", "fla") == "auto"
    assert set(backend_names(*OPS)) == ALL
    assert backend_names("ssd", "mamba2_step") == ("auto", "fla", "reference", "torch", "triton")


@pytest.mark.parametrize(
    ("mixer", "name"), [("gdn", "triton"), ("mamba2", "triton"), ("swa", "triton"), ("full", "flex")]
)
def test_a_mixer_takes_the_backends_of_all_its_operators(mixer: str, name: str) -> None:
    assert MIXERS[mixer](backend=name).backend == name
    with pytest.raises(ConfigError, match=rf"{mixer}.backend .*one of auto, .*{name}"):
        MIXERS[mixer](backend="fast")


def test_a_backend_of_one_operator_leaves_the_others_alone() -> None:
    """`triton` has the decode step of Gated DeltaNet, not its delta rule: training runs."""
    mixer = MIXERS["gdn"](heads=1, head_dim=4, backend="triton").build(8)
    assert mixer(torch.randn(1, 9, 8), Sequence()).isfinite().all()
    with pytest.raises(ConfigError, match="gated_delta_net_step: backend 'triton' cannot be used"), torch.no_grad():
        mixer(torch.randn(1, 1, 8), Sequence(), mixer.init_state(1))


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
        ("reference", dict.fromkeys(OPS, "reference")),
        ("auto", {}),
        (" ", {}),
        ("sdpa", {"attention": "sdpa"}),
        ("ssd=reference, attention=torch", {"ssd": "reference"}),
        (
            "gated_delta_rule=reference,causal_conv=reference",
            {"gated_delta_rule": "reference", "causal_conv": "reference"},
        ),
        ("ssd=auto", {}),
    ],
)
def test_environment(text: str, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDVL_BACKEND", text)
    assert {op: resolve_backend(op, "auto", CPU) for op in OPS} == dict.fromkeys(OPS, "torch") | expected


def test_argument_beats_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDVL_BACKEND", "reference")
    assert resolve_backend("ssd", "torch", CPU) == "torch"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "fast",
            "HYBRIDVL_BACKEND='fast' is unknown; accepted: auto, fla, flash_attn, flex, reference, sdpa, torch, triton",
        ),
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
    assert resolve_backend("causal_conv", "auto", CPU) == "torch"  # has no such backend, so nothing was asked of it


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
    assert {row.op for row in rows} == set(OPS)
    assert len({(row.op, row.backend) for row in rows}) == len(rows)
    assert [row.backend for row in rows if row.chosen] == ["torch"] * len(OPS)
    for row in rows:
        if row.backend not in ("torch", "reference", "sdpa"):
            assert not row.usable
            assert "CUDA" in row.reason
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
        lambda op, requested, *workload, packed: requested,
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


@pytest.mark.usefixtures("_all_installed")
def test_one_name_for_all_holds_for_those_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels without a backward pass are no obstacle to training, unless they are asked for by operator."""
    monkeypatch.setenv("HYBRIDVL_BACKEND", "triton")
    assert resolve_backend("swiglu", "auto", CUDA, BF16) == "triton"
    assert resolve_backend("swiglu", "auto", CUDA, BF16, grad=True) == "torch"
    assert resolve_backend("causal_conv", "auto", CUDA, BF16, packed=True) == "torch"
    with pytest.raises(ConfigError, match=r"HYBRIDVL_BACKEND: swiglu 'triton' cannot be used: .* need CUDA tensors"):
        resolve_backend("swiglu", "auto", CPU, BF16)
    monkeypatch.setenv("HYBRIDVL_BACKEND", "swiglu=triton")
    with pytest.raises(ConfigError, match=r"HYBRIDVL_BACKEND: swiglu 'triton' cannot be used: .* no backward pass"):
        resolve_backend("swiglu", "auto", CUDA, BF16, grad=True)


def test_an_operator_beside_the_one_that_was_meant_chooses_freely_where_it_must() -> None:
    assert usable_or_auto("causal_conv", "triton", CPU, BF16) == "auto"
    assert usable_or_auto("causal_conv", "reference", CPU, BF16, grad=True, packed=True) == "reference"
    assert usable_or_auto("causal_conv", "fla", CPU, BF16) == "auto"
    mixer = MIXERS["gdn"](heads=2, head_dim=8, backend="triton").build(16)
    with torch.no_grad():
        assert mixer(torch.randn(1, 5, 16), Sequence()).isfinite().all()
