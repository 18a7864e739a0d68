"""Cases of the two recurrences: the gated delta rule and Mamba2's scan, over whole sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridvl.bench.cases import Case, Request
from hybridvl.bench.plain import modeling, plain_function
from hybridvl.bench.sides import TOLERANCES, Results, Side, Work, tensor_side
from hybridvl.layers.errors import ConfigError
from hybridvl.layers.ops import gated_delta_rule, ssd
from hybridvl.layers.ops.gated_delta_rule import gated_delta_rule_flops
from hybridvl.layers.ops.ssd import ssd_flops

OURS = "hybridvl"
_STRONGEST = 60.0  # a step's log decay


def log_decays(shape: tuple[int, ...], kind: str, device: str) -> Tensor:
    """g (B, T, H), float32: -softplus of noise, or from -1e-3 to -60 evenly in the logarithm."""
    if kind == "mild":
        return -F.softplus(torch.randn(shape, device=device))
    return -(10 ** (torch.rand(shape, device=device) * 4.778 - 3)).clamp(max=_STRONGEST)


def compulsory_bytes(inputs: Mapping[str, Tensor], outputs: int, backward: bool) -> int:
    """Inputs read and outputs written once; backward: read again, with as many bytes of gradients."""
    once = sum(tensor.nbytes for tensor in inputs.values()) + outputs
    return 3 * once if backward else once


def sequence_work(
    case: str,
    request: Request,
    leaves: dict[str, Tensor],
    calls: Mapping[str, Callable[[], Results]],
    flops: float,
    output_bytes: int,
) -> Work:
    """Sides of pure functions over the same leaves; the first call is ours, and the others must equal it."""
    if request.backward:
        for leaf in leaves.values():
            leaf.requires_grad_()
    cotangents = request.cotangents if request.backward else None
    sides: list[Side] = []
    for name, call in calls.items():
        sides.append(tensor_side(name, call, leaves, cotangents, same_as=OURS if sides else None))
    sizes: dict[str, int | str] = dict(request.sizes)
    if request.decay != "mild":
        sizes["decay "] = request.decay
    return Work(
        name=case,
        sizes=sizes,
        dtype=request.dtype_name,
        direction=request.direction,
        device=request.device,
        sides=tuple(sides),
        flops=flops * (3 if request.backward else 1),
        nbytes=compulsory_bytes(leaves, output_bytes, request.backward),
        tokens=request.sizes["B"] * request.sizes["T"],
        tolerance=TOLERANCES[request.dtype_name],
    )


def _delta_rule(request: Request) -> Work:
    batch, tokens, heads, keys, values = (request.sizes[letter] for letter in "BTHKV")
    torch.manual_seed(0)
    device, cast = request.device, request.cast
    q, k = (cast(F.normalize(torch.randn(batch, tokens, heads, keys, device=device), dim=-1)) for _ in range(2))
    leaves = {
        **{"q": q, "k": k, "v": cast(torch.randn(batch, tokens, heads, values, device=device))},
        **{"g": log_decays((batch, tokens, heads), request.decay, device)},
        **{"beta": torch.rand(batch, tokens, heads, device=device)},
    }

    def ours() -> Results:
        q, k, v, g, beta = leaves.values()
        o, state = gated_delta_rule(q, k, v, g, beta, backend=request.backend)
        return {"o": o, "state": state}

    calls: dict[str, Callable[[], Results]] = {OURS: ours}
    for peer in DELTA_RULE.chosen_peers(request):
        calls[peer] = _DELTA_RULE_PEERS[peer](leaves)
    flops = gated_delta_rule_flops(batch, tokens, heads, keys, values)
    outputs = leaves["v"].nbytes + 4 * batch * heads * keys * values
    return sequence_work(DELTA_RULE.name, request, leaves, calls, flops, outputs)


def _transformers_delta_rule(leaves: dict[str, Tensor]) -> Callable[[], Results]:
    function = plain_function(modeling("qwen3_next"), "torch_chunk_gated_delta_rule")
    q, k, v, g, beta = leaves.values()

    def run() -> Results:
        o, state = function(q, k, v, g=g, beta=beta, output_final_state=True)
        return {"o": o, "state": state}

    return run


def _fla_delta_rule(leaves: dict[str, Tensor]) -> Callable[[], Results]:
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError as error:
        raise ConfigError(f"peer fla: it cannot be imported ({error}); expected flash-linear-attention") from error
    q, k, v, g, beta = leaves.values()

    def run() -> Results:
        o, state = chunk_gated_delta_rule(q, k, v, g=g, beta=beta, output_final_state=True)
        return {"o": o, "state": state}

    return run


def _scan(request: Request) -> Work:
    batch, tokens, heads, dim, state_dim, groups = (request.sizes[letter] for letter in "BTHPNG")
    torch.manual_seed(0)
    device, cast = request.device, request.cast
    step = torch.rand(batch, tokens, heads, device=device) * 0.1 + 1e-3
    rate = -torch.linspace(1, 16, heads, device=device)
    if request.decay == "strong":
        step = log_decays((batch, tokens, heads), "strong", device) / rate
    leaves = {
        **{"x": cast(torch.randn(batch, tokens, heads, dim, device=device)), "dt": step, "A": rate},
        **{name: cast(torch.randn(batch, tokens, groups, state_dim, device=device)) for name in "BC"},
        "D": torch.ones(heads, device=device),
    }

    def ours() -> Results:
        x, dt, rate, b, c, skip = leaves.values()
        y, state = ssd(x, dt, rate, b, c, skip, backend=request.backend)
        return {"y": y, "state": state}

    calls: dict[str, Callable[[], Results]] = {OURS: ours}
    for peer in SCAN.chosen_peers(request):
        calls[peer] = _SCAN_PEERS[peer](leaves)
    flops = ssd_flops(batch, tokens, heads, dim, state_dim)
    return sequence_work(
        SCAN.name, request, leaves, calls, flops, leaves["x"].nbytes + 4 * batch * heads * dim * state_dim
    )


def _transformers_scan(leaves: dict[str, Tensor]) -> Callable[[], Results]:
    function = plain_function(modeling("mamba2"), "mamba2_chunk_scan")
    x, dt, rate, b, c, skip = leaves.values()

    def run() -> Results:
        y, state = function(x, dt, rate, b, c, chunk_size=256, D=skip, return_final_states=True)
        return {"y": y.to(x.dtype), "state": state}

    return run


def _mamba_ssm_scan(leaves: dict[str, Tensor]) -> Callable[[], Results]:
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError as error:
        raise ConfigError(f"peer mamba-ssm: it cannot be imported ({error})") from error
    x, dt, rate, b, c, skip = leaves.values()

    def run() -> Results:
        y, state = mamba_chunk_scan_combined(x, dt, rate, b, c, chunk_size=256, D=skip, return_final_states=True)
        return {"y": y, "state": state}

    return run


_DELTA_RULE_PEERS = {"transformers": _transformers_delta_rule, "fla": _fla_delta_rule}
_SCAN_PEERS = {"transformers": _transformers_scan, "mamba-ssm": _mamba_ssm_scan}

DELTA_RULE = Case(
    name="gated-delta-rule",
    about="the chunked gated delta rule, against transformers' chunk path (CPU) and fla's kernels (GPU)",
    sizes={"B": 1, "T": 2048, "H": 16, "K": 128, "V": 128},
    build=_delta_rule,
    peers={"cpu": ("transformers",), "cuda": ("fla", "transformers")},
    has_reference=True,
)
SCAN = Case(
    name="mamba2-scan",
    about="Mamba2's scan, against transformers' chunk scan (CPU) and mamba-ssm's kernels (GPU)",
    sizes={"B": 1, "T": 2048, "H": 32, "P": 64, "N": 128, "G": 1},
    build=_scan,
    peers={"cpu": ("transformers",), "cuda": ("mamba-ssm", "transformers")},
    has_reference=True,
)
CASES = (DELTA_RULE, SCAN)
