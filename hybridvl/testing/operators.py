"""Every operator's backends against its float64 reference, with gradients, on small inputs of ragged sizes."""

from __future__ import annotations

import importlib
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridvl.layers.ops import attention, causal_conv, gated_delta_rule, ssd
from hybridvl.layers.ops.backend import BackendChoice, backends_report
from hybridvl.layers.ops.gated_norm import gated_rms_norm, rms_norm
from hybridvl.layers.ops.gdn_step import gated_delta_net_step
from hybridvl.layers.ops.mamba2_step import mamba2_step
from hybridvl.layers.ops.ring_attention import cached_attention, ring_attention
from hybridvl.layers.ops.rotary import apply_rotary, rotary_table
from hybridvl.layers.ops.slots import store_in_slots
from hybridvl.layers.ops.swiglu import swiglu

Run = Callable[[str], list[Tensor]]
"""Backend -> outputs, then gradients of the inputs, or the states that were updated."""
_Draw = Callable[..., Tensor]

TOLERANCES = {torch.float32: 1e-2, torch.bfloat16: 4e-2}
"""Largest error relative to the largest value: a wrong kernel is off by far more, TF32 on a GPU by less."""


FORWARD_ONLY = frozenset({("causal_conv", "triton"), ("swiglu", "triton")})
"""Backends without a backward pass, of operators whose gradients are checked."""


@dataclass(frozen=True)
class BackendCheck:
    """A backend of an operator on a device.

    reason: why it cannot run there, or what it raised. dtype: that it was checked in. error: largest difference from
    the float64 reference on the same inputs, relative to its largest value; None when nothing was computed.
    """

    device: str
    op: str
    backend: str
    chosen: bool
    reason: str
    dtype: str | None
    error: float | None
    seconds: float | None
    passed: bool


def check_backends(device: str) -> list[BackendCheck]:
    """Every backend of every operator on a device, in float32, or bfloat16 if it takes no other."""
    wide = {(row.op, row.backend): row.usable for row in backends_report(device, torch.float32)}
    checks = []
    for row in backends_report(device):
        dtype = torch.float32 if wide[row.op, row.backend] else torch.bfloat16
        checks.append(_check(row, device, dtype, row.usable or wide[row.op, row.backend]))
    return checks


def kernel_errors() -> tuple[type[Exception], ...]:
    """What a kernel that is broken, or a package of another version, raises."""
    errors: list[type[Exception]] = [ImportError, OSError, RuntimeError, AttributeError, TypeError]
    if "triton" in sys.modules:
        errors.append(importlib.import_module("triton.errors").TritonError)
    return tuple(errors)


def operator_run(op: str, device: str, inputs: torch.dtype, dtype: torch.dtype) -> Run:
    """A small workload of an operator, computed in `dtype` from inputs that were rounded to another one."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(inputs).to(device, dtype)

    return _RUNS[op](draw)


def _check(row: BackendChoice, device: str, dtype: torch.dtype, usable: bool) -> BackendCheck:
    if not usable:
        return BackendCheck(device, row.op, row.backend, row.chosen, row.reason, None, None, None, True)
    name = str(dtype).removeprefix("torch.")
    start = time.perf_counter()
    try:
        right = operator_run(row.op, device, dtype, torch.float64)("reference")
        found = operator_run(row.op, device, dtype, dtype)(row.backend)
        if (row.op, row.backend) in FORWARD_ONLY:
            right = right[: len(found)]  # gradients come last
        # Not Python's max, which may pass over NaN.
        error = float(torch.tensor([_error(x, y) for x, y in zip(found, right, strict=True)]).max())
    except kernel_errors() as problem:
        reason = f"failed: {type(problem).__name__}: {str(problem).strip().splitlines()[0] if str(problem) else ''}"
        return BackendCheck(device, row.op, row.backend, row.chosen, reason, name, None, None, False)
    seconds = time.perf_counter() - start
    if not math.isfinite(error):
        return BackendCheck(device, row.op, row.backend, row.chosen, "computes NaN", name, None, seconds, False)
    passed = error < TOLERANCES[dtype]
    return BackendCheck(device, row.op, row.backend, row.chosen, "", name, error, seconds, passed)


def _error(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right).abs().max() / right.abs().max())


def _recurrences(draw: _Draw) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v (B, T, H, K) and two rates (B, T, H)."""
    sizes = (2, 75, 2)
    return draw(*sizes, 64), draw(*sizes, 64), draw(*sizes, 64), draw(*sizes), draw(*sizes)


def _with_gradients(op: str, run: Run, *leaves: Tensor) -> Run:
    """The outputs and, where a backend has them, the gradients of the leaves, of the sum of the outputs' squares."""

    def both(backend: str) -> list[Tensor]:
        if (op, backend) in FORWARD_ONLY:
            with torch.no_grad():
                return run(backend)
        with torch.enable_grad():
            outputs = run(backend)
            total = torch.stack([output.double().square().sum() for output in outputs]).sum()
            gradients = torch.autograd.grad(total, leaves)
        return [*(output.detach() for output in outputs), *gradients]

    for leaf in leaves:
        leaf.requires_grad_()
    return both


def _attention(draw: _Draw) -> Run:
    q, k, v, _, _ = _recurrences(draw)
    return _with_gradients("attention", lambda backend: [attention(q, k, v, window=16, backend=backend)], q, k, v)


def _ring_attention(draw: _Draw) -> Run:
    q, k, v, _, _ = _recurrences(draw)
    ring_k, ring_v = draw(2, 16, 2, 64), draw(2, 16, 2, 64)
    length = torch.tensor([21, 9], device=q.device)

    def run(backend: str) -> list[Tensor]:
        with torch.no_grad():
            chunk = ring_attention(q, k, v, ring_k, ring_v, length, backend=backend)
            return [chunk, cached_attention(q[:, :1], ring_k, ring_v, length, backend=backend)]

    return run


def _rotary(draw: _Draw) -> Run:
    x, _, _, _, _ = _recurrences(draw)
    positions = torch.arange(x.shape[1], device=x.device).expand(2, -1)
    cos, sin = rotary_table(positions, x.shape[3], dtype=torch.promote_types(x.dtype, torch.float32))
    return _with_gradients("rotary", lambda backend: [apply_rotary(x, cos, sin, backend)], x)


def _store_in_slots(draw: _Draw) -> Run:
    k, v, slots_k, slots_v = draw(2, 30, 3, 24), draw(2, 30, 3, 40), draw(2, 16, 3, 24), draw(2, 16, 3, 40)
    length, counts = torch.tensor([21, 9], device=k.device), torch.tensor([5, 30], device=k.device)

    def run(backend: str) -> list[Tensor]:
        with torch.no_grad():
            store_in_slots(k, v, slots_k, slots_v, length, counts, backend)
        return [slots_k, slots_v]

    return run


def _gated_delta_rule(draw: _Draw) -> Run:
    q, k, v, a, b = _recurrences(draw)

    def run(backend: str) -> list[Tensor]:
        return list(gated_delta_rule(q, k, v, F.logsigmoid(a), b.sigmoid(), qk_l2norm=True, backend=backend))

    return _with_gradients("gated_delta_rule", run, q, k, v, a, b)


def _ssd(draw: _Draw) -> Run:
    c, b, x, a, rates = _recurrences(draw)

    def run(backend: str) -> list[Tensor]:
        return list(ssd(x, F.softplus(a), -rates[0, 0].exp(), b, c, backend=backend))

    return _with_gradients("ssd", run, x, a, rates, b, c)


def _causal_conv(draw: _Draw) -> Run:
    x, weight, bias, state = draw(2, 75, 128), draw(128, 4), draw(128), draw(2, 128, 4)

    def run(backend: str) -> list[Tensor]:
        return list(causal_conv(x, weight, bias, state, backend=backend))

    return _with_gradients("causal_conv", run, x, weight, bias)


def _swiglu(draw: _Draw) -> Run:
    gate, up = draw(5, 750), draw(5, 750)
    return _with_gradients("swiglu", lambda backend: [swiglu(gate, up, backend)], gate, up)


def _rms_norm(draw: _Draw) -> Run:
    x, weight = draw(5, 75), draw(75)
    return _with_gradients("rms_norm", lambda backend: [rms_norm(x, weight, 1e-5, backend)], x, weight)


def _gated_rms_norm(draw: _Draw) -> Run:
    x, gate, weight = draw(5, 75), draw(5, 75), draw(75)

    def run(backend: str) -> list[Tensor]:
        return [gated_rms_norm(x, gate, weight, 1e-5, groups=3, backend=backend)]

    return _with_gradients("gated_rms_norm", run, x, gate, weight)


def _gated_delta_net_step(draw: _Draw) -> Run:
    rows, heads, keys, values, width = 2, 2, 24, 40, 4
    q, k = draw(rows, heads * keys), draw(rows, heads * keys)
    v, gate = draw(rows, heads * values), draw(rows, heads * values)
    cq, ck, cv = (draw(*x.shape, width) for x in (q, k, v))
    wq, wk, wv = (draw(x.shape[1], width) for x in (q, k, v))
    a, b, rates, bias, norm = draw(rows, heads), draw(rows, heads), draw(heads), draw(heads), draw(values)
    state = _wide(draw(rows, heads, keys, values))

    def run(backend: str) -> list[Tensor]:
        y = gated_delta_net_step(q, k, v, gate, a, b, state, cq, ck, cv, wq, wk, wv, rates, bias, norm, backend=backend)
        return [y, state, cq, ck, cv]

    return run


def _mamba2_step(draw: _Draw) -> Run:
    rows, heads, dim, states, width = 2, 3, 24, 40, 4
    z, channels, dt = draw(rows, heads * dim), draw(rows, heads * dim + 2 * states), draw(rows, heads)
    conv, weight, norm = draw(*channels.shape, width), draw(channels.shape[1], width), draw(heads * dim)
    rates, bias, skip = draw(heads), draw(heads), draw(heads)
    state = _wide(draw(rows, heads, dim, states))

    def run(backend: str) -> list[Tensor]:
        y = mamba2_step(z, channels, dt, state, conv, weight, None, rates, bias, skip, norm, backend=backend)
        return [y, state, conv]

    return run


def _wide(state: Tensor) -> Tensor:
    """A recurrent state in float32 or wider."""
    return state.to(torch.promote_types(state.dtype, torch.float32))


_RUNS: dict[str, Callable[[_Draw], Run]] = {
    "attention": _attention,
    "ring_attention": _ring_attention,
    "gated_delta_rule": _gated_delta_rule,
    "ssd": _ssd,
    "causal_conv": _causal_conv,
    "rotary": _rotary,
    "store_in_slots": _store_in_slots,
    "swiglu": _swiglu,
    "rms_norm": _rms_norm,
    "gated_rms_norm": _gated_rms_norm,
    "gated_delta_net_step": _gated_delta_net_step,
    "mamba2_step": _mamba2_step,
}
