"""Grouped-query softmax attention: all that full and sliding-window attention have in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hybridvl.layers.base import MixerConfig, Sequence, State
from hybridvl.layers.cache import KeyValueState, zero_slots
from hybridvl.layers.norms import RMSNorm
from hybridvl.layers.ops import attention
from hybridvl.layers.ops.attention import attention_flops
from hybridvl.layers.ops.backend import backend_names, backend_or_auto
from hybridvl.layers.ops.ring_attention import cached_attention, ring_attention, ring_attention_flops
from hybridvl.layers.ops.rotary import apply_rotary
from hybridvl.layers.pieces import Piece, head_piece, key_value_heads, qkvo_rule, source_heads
from hybridvl.layers.rows import RowMixer, readable, token_counts
from hybridvl.layers.validate import check_types, check_width, expect, expect_at_least, expect_positive


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(MixerConfig):
    """Options of softmax attention; the defaults are Qwen2.5-VL-3B's.

    Attributes:
        heads: query heads H.
        kv_heads: key and value heads, shared by H / kv_heads consecutive query heads each.
        head_dim: dim per head K; even with rope.
        qkv_bias: biases of the query, key and value projections.
        out_bias: bias of the output projection.
        qk_norm: RMSNorm over each head's query and key, before the rotary embedding.
        rope: turn queries and keys by `Sequence.rotary`; false = no positions.
        norm_eps: epsilon of qk_norm.
        backend: implementation of attention, and of attention to the cache, where they have it.
    """

    weightless = MixerConfig.weightless | {"rope"}

    heads: int = 16
    kv_heads: int = 2
    head_dim: int = 128
    qkv_bias: bool = True
    out_bias: bool = False
    qk_norm: bool = False
    rope: bool = True
    norm_eps: float = 1e-6
    backend: str = "auto"

    def __post_init__(self) -> None:
        check_types(self)
        expect_at_least(self, 1, "heads", "kv_heads", "head_dim")
        expect_positive(self, "norm_eps")
        expect(self, "kv_heads", self.heads % self.kv_heads == 0, f"a divisor of heads = {self.heads}")
        expect(self, "head_dim", not self.rope or self.head_dim % 2 == 0, "an even number with rope")
        names = backend_names("attention", "ring_attention")
        expect(self, "backend", self.backend in names, f"one of {', '.join(names)}")

    @property
    def rotary_dim(self) -> int:
        """The head dim with rope, else 0."""
        return self.head_dim if self.rope else 0

    @property
    def slots_limit(self) -> int | None:
        """Keys that a query may see, itself included (W); None = all."""
        return None

    def num_params(self, width: int) -> int:
        """Exact number of parameters."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        biases = self.qkv_bias * (queries + 2 * keys) + self.out_bias * width
        return 2 * width * (queries + keys) + biases + self.qk_norm * 2 * self.head_dim

    def flops(self, width: int, tokens: int, context: int = 0) -> int:
        """See `MixerConfig.flops`: whole blocks of scores, the masked ones included; with a context, from the cache."""
        queries, window = self.heads * self.head_dim, self.slots_limit
        projections = 4 * tokens * width * (queries + self.kv_heads * self.head_dim)
        if context == 0:
            return projections + attention_flops(1, tokens, tokens, self.heads, self.head_dim, self.head_dim, window)
        if window is None or tokens == 1:
            keys = min(context + tokens, window or context + tokens)
            return projections + 4 * tokens * keys * queries
        return projections + ring_attention_flops(1, tokens, context, self.heads, self.head_dim, self.head_dim, window)

    def cache_bytes(self, slots: int, dtype: torch.dtype) -> int:
        """Bytes of a row's KeyValueState."""
        return 2 * slots * self.kv_heads * self.head_dim * dtype.itemsize + torch.int64.itemsize


class Attention(RowMixer):
    """Causal grouped-query attention over all earlier tokens or, with a window of W, over W tokens, itself included."""

    def __init__(self, config: AttentionConfig, width: int) -> None:
        super().__init__()
        check_width(config, width)
        self.config = config
        self.rotary_dim = config.rotary_dim
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(width, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, width, bias=config.out_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def mix(self, x: Tensor, sequence: Sequence, state: State | None) -> Tensor:
        """See `RowMixer.mix`."""
        q, k, v = self._project(x, sequence)
        if state is None:
            # Padding stands right of every real token, so causality alone hides it.
            o = attention(
                q,
                k,
                v,
                window=self.config.slots_limit,
                cu_seqlens=sequence.cu_seqlens,
                backend=backend_or_auto("attention", self.config.backend),
            )
        else:
            assert isinstance(state, KeyValueState)
            o = self._attend_cache(q, k, v, state, token_counts(x, sequence))
        return self.o_proj(o.flatten(2))

    def empty_cache(
        self, slots: int, batch: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Zero keys and values (B, slots, kv_heads, K) and lengths (B,)."""
        weight = self.q_proj.weight
        device, dtype = weight.device if device is None else device, dtype or weight.dtype
        heads, dim = self.config.kv_heads, self.config.head_dim
        keys, values = (zero_slots(batch, slots, heads, dim, device, dtype) for _ in range(2))
        return keys, values, torch.zeros(batch, dtype=torch.int64, device=device)

    def _project(self, x: Tensor, sequence: Sequence) -> tuple[Tensor, Tensor, Tensor]:
        heads = (-1, self.config.head_dim)
        q, k, v = (proj(x).unflatten(-1, heads) for proj in (self.q_proj, self.k_proj, self.v_proj))  # (B, T, H, K)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.config.rope:
            if self.rotary_dim not in sequence.rotary:
                known = sorted(sequence.rotary)
                raise ValueError(f"sequence.rotary has tables for head dims {known}, attention needs {self.rotary_dim}")
            cos, sin = sequence.rotary[self.rotary_dim]
            q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        return q, k, v

    def _attend_cache(self, q: Tensor, k: Tensor, v: Tensor, state: KeyValueState, counts: Tensor) -> Tensor:
        backend = backend_or_auto("ring_attention", self.config.backend)
        before = state.length.clone()
        if self.config.slots_limit is None or q.shape[1] == 1:
            used = state.append(k, v, counts)
            o = cached_attention(q, readable(state.k[:, :used]), readable(state.v[:, :used]), before, backend=backend)
        else:
            # The first queries of a chunk still see tokens that the chunk's last ones push out of the ring.
            o = ring_attention(q, k, v, readable(state.k), readable(state.v), before, backend=backend)
            state.append(k, v, counts)
        return o


@qkvo_rule(AttentionConfig)  # type: ignore[type-abstract]
def _attention(config: AttentionConfig, source: AttentionConfig, width: int) -> list[Piece]:
    """Attention of another geometry: a key/value head takes what the first of its query heads reads."""
    queries = source_heads(config, "heads", config.heads, source)
    grouped = key_value_heads(queries[:: config.heads // config.kv_heads], source)
    dims = (config.head_dim, source.head_dim)
    pieces = [head_piece("o_proj.weight", "o_proj.weight", queries, dims, axis=1)]
    for kind in ("weight", *(["bias"] if config.qkv_bias and source.qkv_bias else [])):
        for name, heads in (("q_proj", queries), ("k_proj", grouped), ("v_proj", grouped)):
            pieces.append(head_piece(f"{name}.{kind}", f"{name}.{kind}", heads, dims))
    if config.out_bias and source.out_bias:
        pieces.append(Piece("o_proj.bias", "o_proj.bias", range(width), range(width)))
    if config.qk_norm and source.qk_norm:
        pieces += [head_piece(name, name, [0], dims) for name in ("q_norm.weight", "k_norm.weight")]
    return pieces
