"""Every Triton kernel compiles for Hopper (sm_90), at the shapes of InfiniteVL-4B and of odd sizes; needs no GPU.

The interpreter lets pass what the compiler refuses. Launches are replaced by compiling for what would have run.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from hybridvl.layers.ops.kernels.triton_conv import causal_conv
from hybridvl.layers.ops.kernels.triton_gated_norm import gated_rms_norm
from hybridvl.layers.ops.kernels.triton_gdn_step import gated_delta_net_step
from hybridvl.layers.ops.kernels.triton_mamba2_step import mamba2_step
from hybridvl.layers.ops.kernels.triton_ring_attention import _attend
from hybridvl.layers.ops.kernels.triton_rotary import rotate
from hybridvl.layers.ops.kernels.triton_slots import store_in_slots
from hybridvl.layers.ops.kernels.triton_swiglu import swiglu

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_BYTES = 227 * 1024  # that a program on Hopper can have
NAMES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}
SCALARS = {bool: "i1", int: "i32", float: "fp32"}


def argument_type(value: object) -> str:
    return NAMES[value.dtype] if isinstance(value, Tensor) else SCALARS[type(value)]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels that were compiled instead of launched."""
    names: list[str] = []

    def build(kernel: JITFunction, *values: object, grid: object, warmup: bool, **options: int) -> None:
        given = dict(zip(kernel.arg_names, values, strict=True))
        # As a launch does: what is absent or 1 becomes a constant, multiples of 16 are known to be that.
        fixed = {p.name for p in kernel.params if p.is_constexpr}
        constants = {name: x for name, x in given.items() if name in fixed or x is None or (type(x) is int and x == 1)}
        signature = {name: "constexpr" if name in constants else argument_type(x) for name, x in given.items()}
        aligned = {
            (index,): [["tt.divisibility", 16]]
            for index, (name, x) in enumerate(given.items())
            if name not in constants and (isinstance(x, Tensor) or (type(x) is int and x % 16 == 0))
        }
        done = triton.compile(ASTSource(kernel, signature, constants, aligned), target=HOPPER, options=options)
        assert len(done.asm["cubin"]) > 1000
        assert done.metadata.shared <= SHARED_BYTES
        names.append(kernel.__name__)

    monkeypatch.setattr(JITFunction, "run", build)
    yield names
    assert names


@pytest.mark.parametrize(("width", "gate_first"), [(256, False), (5120, True)])
def test_gated_norm(compiled: list[str], width: int, gate_first: bool) -> None:
    x = torch.zeros(40, width, dtype=torch.bfloat16, requires_grad=True)
    gated_rms_norm(x, torch.zeros_like(x), torch.ones(width), 1e-5, 1, gate_first).sum().backward()
    assert compiled == ["_forward", "_backward"]


def test_gated_delta_net_step(compiled: list[str]) -> None:
    heads, K, V, dtype = 16, 128, 256, torch.bfloat16
    keys, values = torch.zeros(1, heads * K, dtype=dtype), torch.zeros(1, heads * V, dtype=dtype)
    convs = tuple(x.new_zeros(*x.shape, 4) for x in (keys, keys, values))
    a, heads_of = torch.zeros(1, heads, dtype=dtype), torch.zeros(heads)
    gated_delta_net_step(
        keys, keys, values, values, a, a, torch.zeros(1, heads, K, V), convs, tuple(x[0] for x in convs), heads_of,
        heads_of, torch.zeros(V, dtype=dtype), 1e-5, False, 1e-6,
    )  # fmt: skip
    assert compiled == ["_rule", "_finish"]


def test_mamba2_step(compiled: list[str]) -> None:
    heads, P, N, dtype = 80, 64, 128, torch.bfloat16
    inner, of_heads = torch.zeros(1, heads * P, dtype=dtype), torch.zeros(heads)
    channels = torch.zeros(1, heads * P + 2 * N, dtype=dtype)
    conv = channels.new_zeros(*channels.shape, 4)
    mamba2_step(
        inner, channels, of_heads[None], torch.zeros(1, heads, P, N), conv, conv[0], channels[0], of_heads, of_heads,
        of_heads, inner[0], 1e-5, 1,
    )  # fmt: skip
    assert compiled == ["_scan", "_finish"]


@pytest.mark.parametrize(
    ("dtype", "tokens", "ring", "splits"),
    [(torch.bfloat16, 1, False, 64), (torch.bfloat16, 256, True, 1)],
)
def test_ring_attention(compiled: list[str], dtype: torch.dtype, tokens: int, ring: bool, splits: int) -> None:
    q, slots_k, slots_v = (torch.zeros(1, n, h, 128, dtype=dtype) for n, h in ((tokens, 16), (8192, 2), (8192, 2)))
    new = (slots_k[:, :tokens], slots_v[:, :tokens]) if ring else (None, None)
    _attend(q, *new, slots_k, slots_v, torch.tensor([9000]), None, splits)
    assert compiled == ["_partial", "_combine"][: 1 + (splits > 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm(compiled: list[str], dtype: torch.dtype) -> None:
    x = torch.zeros(256, 2048, dtype=dtype, requires_grad=True)
    gated_rms_norm(x, None, torch.ones(2048, dtype=dtype), 1e-6, 1, False, cast_first=True).sum().backward()
    assert compiled == ["_forward", "_backward"]


@pytest.mark.parametrize(
    ("heads", "dim", "table"), [(16, 128, torch.bfloat16), (2, 128, torch.float32), (16, 80, torch.float32)]
)
def test_rotary(compiled: list[str], heads: int, dim: int, table: torch.dtype) -> None:
    tables = torch.zeros(1, 256, dim, dtype=table), torch.zeros(1, 256, dim, dtype=table)
    rotate(torch.zeros(1, 256, heads, dim, dtype=torch.bfloat16), *tables)
    assert compiled == ["_rotate"]


@pytest.mark.parametrize("tokens", [1, 256])
def test_slots(compiled: list[str], tokens: int) -> None:
    k = torch.zeros(1, tokens, 2, 128, dtype=torch.bfloat16)
    cache = torch.zeros(1, 2, 8192, 128, dtype=torch.bfloat16).transpose(1, 2)
    store_in_slots(k, k, cache, cache, torch.tensor([9000]), torch.tensor([tokens]))
    assert compiled == ["_store"]


@pytest.mark.parametrize(("carried", "biased"), [(True, False), (False, True)])
def test_conv(compiled: list[str], carried: bool, biased: bool) -> None:
    x = torch.zeros(1, 256, 4096, dtype=torch.bfloat16)
    causal_conv(x, x[0, :4].T, x[0, 0] if biased else None, x[:, :4].mT if carried else None, "silu")
    assert compiled == ["_convolve"]


def test_swiglu(compiled: list[str]) -> None:
    x = torch.zeros(1, 256, 11008, dtype=torch.bfloat16)
    swiglu(x, x)
    assert compiled == ["_gate"]
