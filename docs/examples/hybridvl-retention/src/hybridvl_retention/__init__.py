"""Retention: linear attention with a fixed decay per head (RetNet, arXiv 2307.08621), as a mixer for hybridvl."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hybridvl.layers import MixerConfig, Sequence, State
from hybridvl.layers.norms import GatedRMSNorm, at_least_float32
from hybridvl.layers.ops import ssd
from hybridvl.layers.ops.rotary import apply_rotary
from hybridvl.layers.ops.ssd import ssd_flops
from hybridvl.layers.rows import RowMixer, readable, zero_padding
from hybridvl.layers.validate import check_types, check_width, expect, expect_at_least

__all__ = ["Retention", "RetentionConfig", "RetentionState"]


@dataclass(frozen=True, kw_only=True)
class RetentionConfig(MixerConfig):
    """Options of retention.

    Attributes:
        heads: heads H; they forget at rates from 2^-5 (the first) to 2^-slowest (the last) a token.
        head_dim: dim of queries, keys and values per head K; even.
        slowest: exponent of the slowest rate, at least 5.
        norm_eps: epsilon of the output norm.
    """

    heads: int = 16
    head_dim: int = 128
    slowest: int = 12
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_types(self)
        expect_at_least(self, 1, "heads", "head_dim")
        expect_at_least(self, 5, "slowest")
        expect(self, "head_dim", self.head_dim % 2 == 0, "an even number")

    @property
    def rotary_dim(self) -> int:
        """Queries and keys are turned by their positions."""
        return self.head_dim

    def build(self, width: int) -> Retention:
        """The module for model width D."""
        return Retention(self, width)

    def num_params(self, width: int) -> int:
        """Exact number of parameters."""
        return 5 * width * self.heads * self.head_dim + self.head_dim

    def flops(self, width: int, tokens: int, context: int = 0) -> int:
        """Five projections and the recurrence."""
        projections = 10 * tokens * width * self.heads * self.head_dim
        return projections + ssd_flops(1, tokens, self.heads, self.head_dim, self.head_dim)

    def state_bytes(self, context: int, dtype: torch.dtype, width: int | None = None) -> int:
        """One matrix a head, whatever the context."""
        return self.heads * self.head_dim**2 * at_least_float32(dtype).itemsize


@dataclass
class RetentionState(State):
    """recurrent: (B, H, V, K) in float32 or wider."""

    recurrent: Tensor


class Retention(RowMixer):
    """S = decay S + v k^T; y = o_proj(rmsnorm(S q) * o_norm.weight * silu(g_proj x))."""

    def __init__(self, config: RetentionConfig, width: int) -> None:
        super().__init__()
        check_width(config, width)
        self.config = config
        self.rotary_dim = config.rotary_dim
        inner = config.heads * config.head_dim
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(width, inner, bias=False)
        self.v_proj = nn.Linear(width, inner, bias=False)
        self.g_proj = nn.Linear(width, inner, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=False)
        self.o_norm = GatedRMSNorm(config.head_dim, config.norm_eps)

    def mix(self, x: Tensor, sequence: Sequence, state: State | None) -> Tensor:
        """Aligned x (B, T, D) to (B, T, D): see `RowMixer`, which deals with padding and packed rows."""
        assert state is None or isinstance(state, RetentionState)
        heads = (-1, self.config.head_dim)
        q, k, v, gate = (
            proj(x).unflatten(-1, heads) for proj in (self.q_proj, self.k_proj, self.v_proj, self.g_proj)
        )  # (B, T, H, K) each
        cos, sin = sequence.rotary[self.config.head_dim]
        q, k = apply_rotary(q, cos, sin) * self.config.head_dim**-0.5, apply_rotary(k, cos, sin)
        # A state-space recurrence whose steps have length 1: 0 at padding, which then leaves the state as it is.
        steps = zero_padding(torch.ones_like(x[..., :1], dtype=at_least_float32(x.dtype)), sequence)
        y, final = ssd(
            v,
            steps.expand(-1, -1, self.config.heads),
            self._log_decay(steps),
            k,
            q,
            initial_state=None if state is None else readable(state.recurrent),
            cu_seqlens=sequence.cu_seqlens,
        )
        if state is not None:
            state.recurrent.copy_(final)
        return self.o_proj(self.o_norm(y, gate).flatten(2))

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> RetentionState:
        """An empty state for `batch` rows."""
        weight = self.q_proj.weight
        shape = (batch, self.config.heads, self.config.head_dim, self.config.head_dim)
        wide = at_least_float32(dtype or weight.dtype)
        return RetentionState(torch.zeros(shape, device=weight.device if device is None else device, dtype=wide))

    def _log_decay(self, like: Tensor) -> Tensor:
        """log(1 - 2^-e) with e from 5 to `slowest` over the heads: (H,)."""
        exponents = torch.linspace(5, self.config.slowest, self.config.heads, dtype=like.dtype, device=like.device)
        return torch.log1p(-torch.exp2(-exponents))
