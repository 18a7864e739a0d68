"""Cases of attention, windowed and full, of the short convolution and of the gated norm."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridvl.bench.cases import Case, Request
from hybridvl.bench.plain import modeling, plain_function
from hybridvl.bench.recurrence_cases import OURS, sequence_work
from hybridvl.bench.sides import Results, Work
from hybridvl.layers.errors import ConfigError
from hybridvl.layers.norms import GatedRMSNorm
from hybridvl.layers.ops import attention, causal_conv


def _attention(request: Request, case: Case, window: int | None) -> Work:
    sizes = request.sizes
    batch, tokens, heads, kv_heads, dim = (sizes[letter] for letter in ("B", "T", "H", "Hkv", "K"))
    if heads % kv_heads:
        raise ConfigError(f"--shape: H{heads} Hkv{kv_heads}: expected H to be a multiple of Hkv")
    torch.manual_seed(0)
    shapes = {"q": heads, "k": kv_heads, "v": kv_heads}
    leaves = {
        name: request.cast(torch.randn(batch, tokens, count, dim, device=request.device))
        for name, count in shapes.items()
    }

    def ours() -> Results:
        q, k, v = leaves.values()
        return {"o": attention(q, k, v, window=window, backend=request.backend)}

    calls: dict[str, Callable[[], Results]] = {OURS: ours}
    for peer in case.chosen_peers(request):
        calls[peer] = _ATTENTION_PEERS[peer](leaves, window)
    seen = sum(min(t + 1, window or tokens) for t in range(tokens))  # pairs of query and key
    return sequence_work(case.name, request, leaves, calls, 4 * batch * heads * dim * seen, leaves["q"].nbytes)


def _dense_mask(leaves: dict[str, Tensor], window: int | None) -> Callable[[], Results]:
    """SDPA with the (T, T) mask of the window, made once and not timed."""
    tokens = leaves["q"].shape[1]
    place = torch.arange(tokens, device=leaves["q"].device)
    back = place[:, None] - place
    mask = (back >= 0) & (back < (window or tokens))  # (T, T)

    def run() -> Results:
        q, k, v = (leaf.transpose(1, 2) for leaf in leaves.values())  # (B, H, T, K)
        return {"o": F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)}

    return run


def _causal(leaves: dict[str, Tensor], window: int | None) -> Callable[[], Results]:
    def run() -> Results:
        q, k, v = (leaf.transpose(1, 2) for leaf in leaves.values())  # (B, H, T, K)
        return {"o": F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)}

    return run


def _flash(leaves: dict[str, Tensor], window: int | None) -> Callable[[], Results]:
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise ConfigError(f"peer flash-attn: it cannot be imported ({error})") from error
    q, k, v = leaves.values()

    def run() -> Results:
        return {"o": flash_attn_func(q, k, v, causal=True, window_size=(-1 if window is None else window - 1, 0))}

    return run


def _windowed(request: Request) -> Work:
    return _attention(request, WINDOW, request.sizes["W"])


def _full(request: Request) -> Work:
    return _attention(request, FULL, None)


def _conv(request: Request) -> Work:
    batch, tokens, channels, width = (request.sizes[letter] for letter in "BTDW")
    torch.manual_seed(0)
    leaves = {
        "x": request.cast(torch.randn(batch, tokens, channels, device=request.device)),
        "weight": request.cast(torch.randn(channels, width, device=request.device) / width),
    }

    def ours() -> Results:
        return {"y": causal_conv(leaves["x"], leaves["weight"], backend=request.backend)[0]}

    calls: dict[str, Callable[[], Results]] = {OURS: ours}
    if CONV.chosen_peers(request):
        function = plain_function(modeling("qwen3_next"), "causal_conv1d_fn")

        def peer() -> Results:
            x, weight = leaves.values()
            return {"y": function(x.transpose(1, 2), weight, activation="silu").transpose(1, 2)}

        calls["transformers"] = peer
    flops = 2.0 * batch * tokens * channels * width
    return sequence_work(CONV.name, request, leaves, calls, flops, leaves["x"].nbytes)


def _norm(request: Request) -> Work:
    batch, tokens, heads, dim = (request.sizes[letter] for letter in "BTHV")
    torch.manual_seed(0)
    shape = (batch, tokens, heads, dim)
    leaves = {name: request.cast(torch.randn(shape, device=request.device)) for name in ("x", "gate")}
    norm = GatedRMSNorm(dim, 1e-6).to(request.device, request.dtype)

    def ours() -> Results:
        return {"y": norm(*leaves.values())}

    calls: dict[str, Callable[[], Results]] = {OURS: ours}
    if NORM.chosen_peers(request):
        module = modeling("qwen3_next").Qwen3NextRMSNormGated(dim, eps=1e-6).to(request.device, request.dtype)

        def peer() -> Results:
            return {"y": module(*leaves.values())}

        calls["transformers"] = peer
    return sequence_work(NORM.name, request, leaves, calls, 0.0, leaves["x"].nbytes)


_ATTENTION_PEERS = {"sdpa-dense-mask": _dense_mask, "sdpa-causal": _causal, "flash-attn": _flash}
_HEADS = {"H": 16, "Hkv": 2, "K": 128}

WINDOW = Case(
    name="window-attention",
    about="sliding-window attention, against SDPA with a dense mask (CPU, GPU) and flash-attn (GPU)",
    sizes={"B": 1, "T": 8192, **_HEADS, "W": 512},
    build=_windowed,
    peers={"cpu": ("sdpa-dense-mask",), "cuda": ("flash-attn", "sdpa-dense-mask")},
    has_reference=True,
)
FULL = Case(
    name="full-attention",
    about="causal attention, against SDPA and flash-attn (GPU)",
    sizes={"B": 1, "T": 2048, **_HEADS},
    build=_full,
    peers={"cpu": ("sdpa-causal",), "cuda": ("flash-attn", "sdpa-causal")},
    has_reference=True,
)
CONV = Case(
    name="causal-conv",
    about="the short convolution with SiLU, against transformers' (CPU)",
    sizes={"B": 1, "T": 2048, "D": 4096, "W": 4},
    build=_conv,
    peers={"cpu": ("transformers",), "cuda": ("transformers",)},
    has_reference=True,
)
NORM = Case(
    name="gated-norm",
    about="the gated RMS norm of each head, against Qwen3-Next's",
    sizes={"B": 1, "T": 2048, "H": 16, "V": 256},
    build=_norm,
    peers={"cpu": ("transformers",), "cuda": ("transformers",)},
    has_reference=True,
)
CASES = (WINDOW, FULL, CONV, NORM)
