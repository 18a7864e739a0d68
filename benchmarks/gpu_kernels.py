"""What `gpu_check.py` runs of single operators: ours by every backend, and the kernels of others for the same work."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridvl.layers import MIXERS, Sequence
from hybridvl.layers.ops import attention, causal_conv, gated_delta_rule, ssd
from hybridvl.layers.ops.backend import backend_names
from hybridvl.layers.ops.gated_norm import gated_rms_norm, rms_norm
from hybridvl.layers.ops.gdn_step import gated_delta_net_step
from hybridvl.layers.ops.mamba2_step import mamba2_step
from hybridvl.layers.ops.ring_attention import cached_attention, ring_attention
from hybridvl.layers.ops.rotary import apply_rotary, rotary_table
from hybridvl.layers.ops.slots import store_in_slots
from hybridvl.layers.ops.swiglu import swiglu

Run = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Sizes:
    """Sizes of the cases; the defaults are InfiniteVL-4B's."""

    width: int = 2048
    heads: int = 16
    kv_heads: int = 2
    key_dim: int = 128
    value_dim: int = 256
    window: int = 8192
    tokens: int = 8192
    frame: int = 256
    mamba_heads: int = 64
    head_dim: int = 64
    state_dim: int = 128

    @classmethod
    def tiny(cls) -> Sizes:
        """For the interpreter on a CPU."""
        return cls(64, 4, 2, 16, 32, 40, 48, 9, 4, 16, 16)


@dataclass
class Case:
    """One piece of work.

    runs: by side; the first is ours as `auto` has it. right: the same in float64, None: not compared. peers: sides that
    ours must not be slower than. nbytes: least that must be read and written. reset: brings states back that runs
    change. graph: launches are so short that they are timed in a CUDA graph. other: sides that do other work and are
    not compared, and why.
    """

    name: str
    runs: dict[str, Run]
    right: Run | None = None
    peers: tuple[str, ...] = ()
    nbytes: int = 0
    graph: bool = False
    tolerance: float = 2e-2
    reset: Callable[[], object] = list
    other: dict[str, str] = field(default_factory=dict)


class Draw:
    """Random tensors on a device, rounded to a dtype."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(*shape, generator=self.generator, device=self.device) * scale
        return x.to(self.dtype)


def cases(sizes: Sizes, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """All of them, one after another: each lets go of the memory of the one before."""
    draw = Draw(device, dtype)
    yield _delta_net_step(sizes, draw)
    yield _mamba2_step(sizes, draw)
    yield _decode_attention(sizes, draw)
    yield _frame_attention(sizes, draw)
    yield _frame_slots(sizes, draw)
    yield _frame_rotary(sizes, draw)
    yield _frame_convolution(sizes, draw)
    yield _frame_norm(sizes, draw)
    yield _frame_gate(sizes, draw)
    yield from (_norm(sizes, draw, backward) for backward in (False, True))
    yield from (_delta_rule(sizes, draw, backward) for backward in (False, True))
    yield _ssd(sizes, draw)
    for window in (None, min(512, sizes.tokens // 2)):
        yield from (_attention(sizes, draw, window, backward) for backward in (False, True))
    yield _layer(sizes, draw)


def _from(module: str, name: str) -> Any:
    """A function of a package that may not be there; the caller's side then says so."""
    return getattr(importlib.import_module(module), name)


def _backends(op: str, run: Callable[[str], list[Tensor]], *more: str) -> dict[str, Run]:
    """`auto` first, then every backend but the reference."""
    names = [name for name in backend_names(op) if name not in ("auto", "reference", *more)]
    return {f"ours ({name})": (lambda name=name: run(name)) for name in ("auto", *names)}


def _delta_net_step(sizes: Sizes, draw: Draw) -> Case:
    H, K, V, W = sizes.heads, sizes.key_dim, sizes.value_dim, 4
    tokens = [draw(1, H * K), draw(1, H * K), draw(1, H * V), draw(1, H * V), draw(1, H), draw(1, H)]
    states = [draw(1, H, K, V).float(), draw(1, H * K, W), draw(1, H * K, W), draw(1, H * V, W)]
    weights = [draw(H * K, W), draw(H * K, W), draw(H * V, W), draw(H).float(), draw(H).float(), draw(V)]

    reset = _keeper(states)

    def step(backend: str, wide: bool = False) -> list[Tensor]:
        given = [x.double() for x in (*tokens, *states, *weights)] if wide else [*tokens, *states, *weights]
        return [gated_delta_net_step(*given, backend=backend), *given[6:10]]

    def peer() -> list[Tensor]:
        rule = _from("fla.ops.gated_delta_rule", "fused_recurrent_gated_delta_rule")
        q, k, v = (x.view(1, 1, H, -1) for x in tokens[:3])
        g, beta = -F.softplus(tokens[4].float()).view(1, 1, H), tokens[5].sigmoid().view(1, 1, H)
        return [rule(q, k, v, g=g, beta=beta, initial_state=states[0], output_final_state=True,
                     use_qk_l2norm_in_kernel=True)[0]]  # fmt: skip

    side = "fla fused_recurrent, delta rule alone"
    runs = _backends("gated_delta_net_step", step) | {side: peer}
    nbytes = 2 * sum(x.nbytes for x in states) + sum(x.nbytes for x in (*tokens, *weights))
    right = torch.no_grad()(lambda: step("reference", True))
    other = {side: "no convolutions, gates or norm"}
    return Case("decode step of Gated DeltaNet", runs, right, (side,), nbytes, True, reset=reset, other=other)


def _mamba2_step(sizes: Sizes, draw: Draw) -> Case:
    H, P, N, W = sizes.mamba_heads, sizes.head_dim, sizes.state_dim, 4
    channels = H * P + 2 * N
    tokens = [draw(1, H * P), draw(1, channels), draw(1, H)]
    states = [draw(1, H, P, N).float(), draw(1, channels, W)]
    rates = [draw(H).float() for _ in range(3)]
    weights = [draw(channels, W), draw(channels), *rates, draw(H * P)]

    reset = _keeper(states)

    def step(backend: str, wide: bool = False) -> list[Tensor]:
        given = [x.double() for x in (*tokens, *states, *weights)] if wide else [*tokens, *states, *weights]
        return [mamba2_step(*given, backend=backend), *given[3:5]]

    def peer() -> list[Tensor]:
        update = _from("mamba_ssm.ops.triton.selective_state_update", "selective_state_update")
        x, b, c = tokens[1].split((H * P, N, N), dim=-1)
        spread = [t.float()[:, None].expand(H, P) for t in (rates[1], rates[2])]
        A = -rates[0].exp()[:, None, None].expand(H, P, N)
        return [update(states[0], x.view(1, H, P), tokens[2][..., None].expand(1, H, P), A, b[:, None], c[:, None],
                       spread[1], z=tokens[0].view(1, H, P), dt_bias=spread[0], dt_softplus=True)]  # fmt: skip

    side = "mamba_ssm selective_state_update"
    runs = _backends("mamba2_step", step) | {side: peer}
    nbytes = 2 * sum(x.nbytes for x in states) + sum(x.nbytes for x in (*tokens, *weights))
    right = torch.no_grad()(lambda: step("reference", True))
    other = {side: "no convolution or norm"}
    return Case("decode step of Mamba2", runs, right, (), nbytes, True, reset=reset, other=other)


def _cache(sizes: Sizes, draw: Draw, tokens: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Queries, keys and values of new tokens; a full ring; how many tokens it has seen."""
    K = sizes.key_dim
    new = [draw(1, tokens, heads, K) for heads in (sizes.heads, sizes.kv_heads, sizes.kv_heads)]
    ring = [draw(1, sizes.window, sizes.kv_heads, K) for _ in range(2)]
    return new, ring, torch.tensor([3 * sizes.window + sizes.window // 3], device=draw.device)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return o.transpose(1, 2)


def _decode_attention(sizes: Sizes, draw: Draw) -> Case:
    (q, _, _), (k, v), length = _cache(sizes, draw, 1)
    runs = _backends("ring_attention", lambda name: [cached_attention(q, k, v, length, backend=name)])
    runs["SDPA"] = lambda: [_sdpa(q, k, v)]
    return Case(
        "attention of a token to a full ring",
        runs,
        lambda: [cached_attention(q.double(), k.double(), v.double(), length, backend="reference")],
        ("SDPA",),
        k.nbytes + v.nbytes,
        graph=True,
    )


def _frame_attention(sizes: Sizes, draw: Draw) -> Case:
    new, ring, length = _cache(sizes, draw, sizes.frame)
    runs = _backends("ring_attention", lambda name: [ring_attention(*new, *ring, length, backend=name)])
    wide = [x.double() for x in (*new, *ring)]
    q, k, v = new
    # The peer gets the ring's keys in their order, which is not timed.
    oldest = int(length) % sizes.window
    everything = [torch.cat((x.roll(-oldest, 1), new_x), dim=1) for x, new_x in zip(ring, (k, v), strict=True)]
    key, query = (torch.arange(n, device=draw.device) for n in (sizes.window + sizes.frame, sizes.frame))
    band = (key <= query[:, None] + sizes.window) & (key > query[:, None])
    runs["SDPA, dense mask, keys in order"] = lambda: [_sdpa(q, *everything, mask=band)]
    return Case(
        "attention of a frame to a full ring",
        runs,
        lambda: [ring_attention(*wide, length, backend="reference")],
        ("SDPA, dense mask, keys in order",),
        sum(x.nbytes for x in (*new, *ring)),
        graph=True,
    )


def _frame_slots(sizes: Sizes, draw: Draw) -> Case:
    (_, k, v), ring, length = _cache(sizes, draw, sizes.frame)
    counts = torch.full_like(length, sizes.frame)
    reset = _keeper(list(ring))

    def run(name: str, wide: bool = False) -> list[Tensor]:
        slots = [x.double() for x in ring] if wide else ring
        store_in_slots(k, v, *slots, length, counts, name)
        return list(slots)

    runs, nbytes = _backends("store_in_slots", run), 2 * (k.nbytes + v.nbytes)
    name = "keys and values of a frame into a ring"
    return Case(name, runs, lambda: run("reference", wide=True), nbytes=nbytes, graph=True, reset=reset)


def _frame_rotary(sizes: Sizes, draw: Draw) -> Case:
    x = draw(1, sizes.frame, sizes.heads, sizes.key_dim)
    tables = rotary_table(torch.arange(sizes.frame, device=draw.device)[None], sizes.key_dim, dtype=draw.dtype)
    runs = _backends("rotary", lambda name: [apply_rotary(x, *tables, name)])
    wide = [t.double() for t in tables]
    right = lambda: [apply_rotary(x.double(), *wide, "reference")]  # noqa: E731
    return Case("rotary positions of a frame", runs, right, nbytes=2 * x.nbytes, graph=True)


def _frame_convolution(sizes: Sizes, draw: Draw) -> Case:
    channels = sizes.heads * sizes.value_dim
    x, weight, state = draw(1, sizes.frame, channels), draw(channels, 4), draw(1, channels, 4)

    def run(name: str, *given: Tensor) -> list[Tensor]:
        x, weight, state = given
        return list(causal_conv(x, weight, initial_state=state, backend=name))

    runs = _backends("causal_conv", lambda name: run(name, x, weight, state))
    wide = [t.double() for t in (x, weight, state)]
    return Case("convolution of a frame", runs, lambda: run("reference", *wide), nbytes=2 * x.nbytes, graph=True)


def _frame_norm(sizes: Sizes, draw: Draw) -> Case:
    x, weight = draw(1, sizes.frame, sizes.width), draw(sizes.width)
    runs = _backends("rms_norm", lambda name: [rms_norm(x, weight, 1e-6, name)])
    right = lambda: [rms_norm(x.double(), weight.double(), 1e-6, "reference")]  # noqa: E731
    return Case("norm of a frame", runs, right, nbytes=2 * x.nbytes, graph=True)


def _frame_gate(sizes: Sizes, draw: Draw) -> Case:
    gate, up = draw(1, sizes.frame, 5 * sizes.width), draw(1, sizes.frame, 5 * sizes.width)
    runs = _backends("swiglu", lambda name: [swiglu(gate, up, name)])
    right = lambda: [swiglu(gate.double(), up.double(), "reference")]  # noqa: E731
    return Case("gate of a frame's MLP", runs, right, nbytes=3 * up.nbytes, graph=True)


def _keeper(states: list[Tensor]) -> Callable[[], object]:
    """Puts the present values back."""
    kept = [x.clone() for x in states]
    return lambda: [x.copy_(y) for x, y in zip(states, kept, strict=True)]


def _with_gradients(
    run: Callable[[str], list[Tensor]], leaves: list[Tensor], backward: bool
) -> Callable[[str], list[Tensor]]:
    """Outputs, or with `backward` also the gradients of their first."""
    if not backward:
        return torch.no_grad()(run)
    for leaf in leaves:
        leaf.requires_grad_()

    def both(name: str) -> list[Tensor]:
        outputs = run(name)
        return [outputs[0], *torch.autograd.grad(outputs[0], leaves, torch.ones_like(outputs[0]))]

    return both


def _way(backward: bool) -> str:
    return "forward and backward" if backward else "forward"


def _norm(sizes: Sizes, draw: Draw, backward: bool) -> Case:
    shape = (sizes.tokens, sizes.heads, sizes.value_dim)
    leaves = [draw(*shape), draw(*shape), draw(sizes.value_dim)]

    def run(name: str, given: list[Tensor] | None = None) -> list[Tensor]:
        x, gate, weight = given or leaves
        if name == "fla":
            return [_from("fla.modules.norm.fused_norm_gate", "rms_norm_gated")(x, gate, weight, None, eps=1e-5)]
        return [gated_rms_norm(x, gate, weight, 1e-5, backend=name)]

    both = _with_gradients(run, leaves, backward)
    wide = [x.detach().double() for x in leaves]
    right = _with_gradients(lambda name: run(name, wide), wide, backward)
    runs = _backends("gated_rms_norm", both) | {"fla rms_norm_gated": lambda: both("fla")}
    nbytes = leaves[0].nbytes * (8 if backward else 3)
    return Case(f"gated norm, {_way(backward)}", runs, lambda: right("reference"), ("fla rms_norm_gated",), nbytes)


def _delta_rule(sizes: Sizes, draw: Draw, backward: bool) -> Case:
    T, H = sizes.tokens, sizes.heads
    leaves = [draw(1, T, H, sizes.key_dim), draw(1, T, H, sizes.key_dim), draw(1, T, H, sizes.value_dim)]
    g, beta = -F.softplus(draw(1, T, H).float()), draw(1, T, H).sigmoid()

    def run(name: str, given: list[Tensor] | None = None) -> list[Tensor]:
        q, k, v = given or leaves
        if name == "peer":
            rule = _from("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")
            return [rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0]]
        return [gated_delta_rule(q, k, v, g, beta, qk_l2norm=True, backend=name)[0]]

    both = _with_gradients(run, leaves, backward)
    runs = _backends("gated_delta_rule", both) | {"fla chunk": lambda: both("peer")}
    wide = [x.detach().double() for x in leaves]  # chunks in float64: their own tests compare them with the recurrence
    right = _with_gradients(lambda name: run(name, wide), wide, backward)
    return Case(f"gated delta rule, {_way(backward)}", runs, lambda: right("torch"), ("fla chunk",), tolerance=4e-2)


def _ssd(sizes: Sizes, draw: Draw) -> Case:
    T, H, P, N = sizes.tokens, sizes.mamba_heads, sizes.head_dim, sizes.state_dim
    x, b, c = draw(1, T, H, P), draw(1, T, 1, N), draw(1, T, 1, N)
    dt, rates = F.softplus(draw(1, T, H).float() - 4), -draw(H).float().exp()

    def peer() -> list[Tensor]:
        scan = _from("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
        return [scan(x, dt, rates, b, c, chunk_size=256)]

    runs = _backends("ssd", torch.no_grad()(lambda name: [ssd(x, dt, rates, b, c, backend=name)[0]]))
    runs["mamba_ssm"] = torch.no_grad()(peer)
    right = torch.no_grad()(lambda: [ssd(*(t.double() for t in (x, dt, rates, b, c)), backend="torch")[0]])
    return Case("SSD, forward", runs, right, tolerance=4e-2)


def _attention(sizes: Sizes, draw: Draw, window: int | None, backward: bool) -> Case:
    T, K = sizes.tokens, sizes.key_dim
    leaves = [draw(1, T, heads, K) for heads in (sizes.heads, sizes.kv_heads, sizes.kv_heads)]

    def run(name: str, given: list[Tensor] | None = None) -> list[Tensor]:
        q, k, v = given or leaves
        if name == "SDPA":
            return [_sdpa(q, k, v, causal=True)]
        return [attention(q, k, v, window=window, backend=name)]

    both = _with_gradients(run, leaves, backward)
    wide = [x.detach().double() for x in leaves]
    right = _with_gradients(lambda name: run(name, wide), wide, backward)
    runs = _backends("attention", both)
    if window is None:
        runs["SDPA"] = lambda: both("SDPA")
    name = "full" if window is None else f"window {window}"
    peers = ("SDPA",) if window is None else ()
    return Case(f"attention, {name}, {_way(backward)}", runs, lambda: right("torch"), peers)


def _layer(sizes: Sizes, draw: Draw) -> Case:
    """A whole Gated DeltaNet layer in training, ours and fla's: other weights, so times only."""
    options = {"heads": sizes.heads, "head_dim": sizes.key_dim, "expand_v": sizes.value_dim / sizes.key_dim}
    mixer = MIXERS["gdn"](**options).build(sizes.width).to(draw.device, draw.dtype)
    x = draw(1, sizes.tokens, sizes.width).requires_grad_()
    built: dict[str, Any] = {}

    def ours() -> list[Tensor]:
        y = mixer(x, Sequence())
        return [y, *torch.autograd.grad(y.sum(), [x, *mixer.parameters()])]

    def theirs() -> list[Tensor]:
        if not built:
            layer = _from("fla.layers", "GatedDeltaNet")(
                hidden_size=sizes.width, num_heads=sizes.heads, head_dim=sizes.key_dim, expand_v=options["expand_v"]
            )
            built["layer"] = layer.to(draw.device, draw.dtype)
        layer = built["layer"]
        y = layer(x)[0]
        return [y, *torch.autograd.grad(y.sum(), [x, *layer.parameters()])]

    other = {"fla's layer": "other weights: only its time is compared"}
    runs = {"ours": ours, "fla's layer": theirs}
    return Case("Gated DeltaNet layer, forward and backward", runs, None, ("fla's layer",), other=other)
