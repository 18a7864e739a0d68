"""The gated delta rule: a linear recurrence whose state is decayed, then corrected along each key."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridvl.layers.errors import ConfigError
from hybridvl.layers.ops.backend import resolve_backend
from hybridvl.layers.ops.checks import check_floating, check_segments, check_shape, full_precision, internal_dtype
from hybridvl.layers.ops.chunk_layout import CHUNK
from hybridvl.layers.ops.chunked import chunked_recurrence, chunked_recurrence_flops
from hybridvl.layers.ops.packing import map_segments

L2_EPS = 1e-6  # of the unit length of queries and keys, as in fla
_STEPWISE_TOKENS = 4  # up to here the recurrence itself is faster than a chunk


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    scale: float | None = None,
    qk_l2norm: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """S = e^g S; S = S + k (beta (v - k^T S))^T; o = scale S^T q, for each token and head (arXiv 2412.06464).

    q, k: (B, T, Hk, K). v: (B, T, H, V), H a multiple of Hk: head h uses query and key head h // (H / Hk).
    g: (B, T, H) log decay, <= 0, -inf forgets all. beta: (B, T, H). initial_state: (N, H, K, V), zeros if None.
    scale: of q, K^-0.5 if None. qk_l2norm: q and k become x / sqrt(sum x^2 + 1e-6) first.
    cu_seqlens: (N + 1,) boundaries of the segments packed into one row (B = 1).
    Returns o (B, T, H, V) in v's dtype and the final state (N, H, K, V), N = B when not packed, in float32. Computes in
    float32 whatever the inputs' dtype and autocast, in float64 if any input is float64.
    Backends: "reference", "torch" (chunks), "fla" (CUDA; bfloat16 or float16); a few tokens take the recurrence in all
    of them. Raises ConfigError naming a misshapen argument.
    """
    _check(q, k, v, g, beta, initial_state, cu_seqlens)
    chosen = resolve_backend(
        "gated_delta_rule",
        backend,
        v.device,
        v.dtype,
        k.shape[-1],
        v.shape[-1],
        v.shape[1],
        packed=cu_seqlens is not None,
    )
    factor = k.shape[-1] ** -0.5 if scale is None else scale
    if chosen == "fla" and v.shape[1] > _STEPWISE_TOKENS:
        from hybridvl.layers.ops.kernels import fla

        return fla.gated_delta_rule(q, k, v, g, beta, initial_state, factor, qk_l2norm, cu_seqlens)
    unit_eps = L2_EPS if qk_l2norm else None

    def segments(tokens: list[Tensor], state: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        if state is None:
            rows, heads = tokens[2].shape[0], v.shape[2]
            state = torch.zeros(rows, heads, k.shape[-1], v.shape[-1], dtype=internal_dtype(*tokens), device=v.device)
        if chosen == "reference" or tokens[2].shape[1] <= _STEPWISE_TOKENS:
            return _reference(tokens, state, factor, unit_eps)
        query, key, value, decay, rate = tokens
        return chunked_recurrence(query, key, value, decay, rate, state, factor, delta=True, unit_eps=unit_eps)

    with full_precision(v.device):
        if cu_seqlens is None:
            return segments([q, k, v, g, beta], initial_state, None)
        o, final = map_segments(segments, [q, k, v, g, beta], initial_state, cu_seqlens, CHUNK)
    assert final is not None
    return o, final


def gated_delta_rule_flops(rows: int, tokens: int, heads: int, key_dim: int, value_dim: int) -> int:
    """Matrix-product FLOPs (2 per multiply-add) of one forward pass of the PyTorch path, as FlopCounterMode counts."""
    if tokens > _STEPWISE_TOKENS:
        return chunked_recurrence_flops(rows * heads, tokens, key_dim, value_dim, delta=True)
    return rows * heads * tokens * 6 * key_dim * value_dim


def _reference(tokens: list[Tensor], state: Tensor, scale: float, unit_eps: float | None) -> tuple[Tensor, Tensor]:
    """The definition, token by token."""
    dtype = internal_dtype(*tokens, state)
    out_dtype = tokens[2].dtype
    q, k, v, g, beta = (x.to(dtype) for x in tokens)
    if unit_eps is not None:
        q, k = (x * (x.square().sum(-1, keepdim=True) + unit_eps).rsqrt() for x in (q, k))
    repeats = v.shape[2] // k.shape[2]
    q, k = (x.repeat_interleave(repeats, dim=2) if repeats > 1 else x for x in (q * scale, k))  # (B, T, H, K)
    decay = g.exp()[..., None, None]
    beta = beta[..., None, None]
    state = state.to(dtype)
    outputs = []
    for t in range(v.shape[1]):
        key, value = k[:, t, :, :, None], v[:, t, :, None, :]  # (B, H, K, 1), (B, H, 1, V)
        state = state * decay[:, t]
        error = beta[:, t] * (value - key.mT @ state)
        state = state + key @ error
        outputs.append(q[:, t, :, None, :] @ state)
    o = torch.cat(outputs, dim=2).transpose(1, 2) if outputs else v
    return o.to(out_dtype), state


def _check(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    op = "gated_delta_rule"
    check_floating(op, {"q": q, "k": k, "v": v, "g": g, "beta": beta, "initial_state": initial_state})
    check_shape(op, "v", v, "(B, T, H, V)", (None, None, None, None))
    batch, tokens, heads, value_dim = v.shape
    check_shape(op, "q", q, "(B, T, Hk, K)", (batch, tokens, None, None))
    check_shape(op, "k", k, "(B, T, Hk, K)", tuple(q.shape))
    if k.shape[2] == 0 or heads % k.shape[2]:
        raise ConfigError(f"{op}: v has {heads} heads, expected a multiple of the {k.shape[2]} heads of q and k")
    check_shape(op, "g", g, "(B, T, H)", (batch, tokens, heads))
    check_shape(op, "beta", beta, "(B, T, H)", (batch, tokens, heads))
    check_segments(op, cu_seqlens, batch, tokens)
    if initial_state is not None:
        rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        check_shape(op, "initial_state", initial_state, "(N, H, K, V)", (rows, heads, k.shape[3], value_dim))
