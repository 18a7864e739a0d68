"""The state-space dual form of Mamba2: a linear recurrence with one scalar decay for each head and token."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridvl.layers.errors import ConfigError
from hybridvl.layers.ops.backend import resolve_backend
from hybridvl.layers.ops.checks import check_floating, check_segments, check_shape, full_precision, internal_dtype
from hybridvl.layers.ops.chunk_layout import CHUNK
from hybridvl.layers.ops.chunked import chunked_recurrence, chunked_recurrence_flops
from hybridvl.layers.ops.packing import map_segments

_STEPWISE_TOKENS = 4  # up to here the recurrence itself is faster than a chunk


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """S = e^(dt A) S + dt x B^T; y = S C + D x, for each token and head (arXiv 2405.21060).

    x: (B, T, H, P). dt: (B, T, H) step sizes, after softplus. A: (H,), negative. B, C: (B, T, G, N), H a multiple of G:
    head h uses group h // (H / G). D: (H,), no skip if None. initial_state: (rows, H, P, N), zeros if None.
    cu_seqlens: (rows + 1,) boundaries of the segments packed into one row (B = 1).
    Returns y (B, T, H, P) in x's dtype and the final state (rows, H, P, N), rows = B when not packed, in float32.
    Computes in float32 whatever the inputs' dtype and autocast, in float64 if any input is float64.
    Backends: "reference", "torch" (chunks), "fla" (CUDA; bfloat16 or float16); a few tokens take the recurrence in all
    of them. Raises ConfigError naming a misshapen argument.
    """
    _check(x, dt, A, B, C, D, initial_state, cu_seqlens)
    packed = cu_seqlens is not None
    chosen = resolve_backend("ssd", backend, x.device, x.dtype, B.shape[3], x.shape[3], x.shape[1], packed=packed)
    run = _reference if chosen == "reference" else _torch

    def segments(tokens: list[Tensor], state: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        if state is None:
            shape = (tokens[0].shape[0], *x.shape[2:], B.shape[-1])
            state = torch.zeros(shape, dtype=internal_dtype(*tokens, A), device=x.device)
        return run(tokens, A, D, state)

    with full_precision(x.device):
        if chosen == "fla" and x.shape[1] > _STEPWISE_TOKENS:
            from hybridvl.layers.ops.kernels import fla

            y, final = fla.ssd(x, dt, A, B, C, initial_state, cu_seqlens)
            y = y if D is None else _with_skip(y, x, D)
        elif cu_seqlens is None:
            y, final = segments([x, dt, B, C], initial_state, None)
        else:
            y, packed_final = map_segments(segments, [x, dt, B, C], initial_state, cu_seqlens, CHUNK)
            assert packed_final is not None
            final = packed_final
    return y.to(x.dtype), final


def ssd_flops(rows: int, tokens: int, heads: int, head_dim: int, state_dim: int) -> int:
    """Matrix-product FLOPs (2 per multiply-add) of one forward pass of the PyTorch path, as FlopCounterMode counts."""
    if tokens > _STEPWISE_TOKENS:
        return chunked_recurrence_flops(rows * heads, tokens, state_dim, head_dim, delta=False)
    return rows * heads * tokens * 4 * head_dim * state_dim


def _torch(tokens: list[Tensor], A: Tensor, D: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    x, dt, B, C = tokens
    if x.shape[1] <= _STEPWISE_TOKENS:
        return _reference(tokens, A, D, state)
    dt = dt.to(internal_dtype(x, dt, A))
    y, final = chunked_recurrence(C, B, x, dt * A, dt, state.mT, scale=1.0, delta=False, skip=D)
    return y, final.mT


def _reference(tokens: list[Tensor], A: Tensor, D: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, token by token."""
    dtype = internal_dtype(*tokens, A, state)
    x, dt, B, C = (t.to(dtype) for t in tokens)
    repeats = x.shape[2] // B.shape[2]
    B, C = (t.repeat_interleave(repeats, dim=2) if repeats > 1 else t for t in (B, C))  # (B, T, H, N)
    decay = (dt * A.to(dtype)).exp()[..., None, None]
    written = x * dt[..., None]
    state = state.to(dtype)
    outputs = []
    for t in range(x.shape[1]):
        state = state * decay[:, t] + written[:, t, :, :, None] @ B[:, t, :, None, :]  # (B, H, P, N)
        outputs.append(state @ C[:, t, :, :, None])
    y = torch.cat(outputs, dim=-1).permute(0, 3, 1, 2) if outputs else x
    return (y if D is None else _with_skip(y, x, D)), state


def _with_skip(y: Tensor, x: Tensor, D: Tensor) -> Tensor:
    return y + D[:, None].to(y.dtype) * x


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    op = "ssd"
    check_floating(op, {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "initial_state": initial_state})
    check_shape(op, "x", x, "(B, T, H, P)", (None, None, None, None))
    batch, tokens, heads, head_dim = x.shape
    check_shape(op, "dt", dt, "(B, T, H)", (batch, tokens, heads))
    check_shape(op, "A", A, "(H,)", (heads,))
    check_shape(op, "B", B, "(B, T, G, N)", (batch, tokens, None, None))
    check_shape(op, "C", C, "(B, T, G, N)", tuple(B.shape))
    if B.shape[2] == 0 or heads % B.shape[2]:
        raise ConfigError(f"{op}: x has {heads} heads, expected a multiple of the {B.shape[2]} groups of B and C")
    if D is not None:
        check_shape(op, "D", D, "(H,)", (heads,))
    check_segments(op, cu_seqlens, batch, tokens)
    if initial_state is not None:
        rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        check_shape(op, "initial_state", initial_state, "(rows, H, P, N)", (rows, heads, head_dim, B.shape[3]))
