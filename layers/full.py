"""Full causal attention, whose cache grows with the context."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from hybridvl.layers.cache import KeyValueState, zero_slots
from hybridvl.layers.registry import register
from hybridvl.layers.softmax_attention import Attention, AttentionConfig

BLOCK = 64  # slots by which the cache grows


@register("full")
@dataclass(frozen=True, kw_only=True)
class FullAttentionConfig(AttentionConfig):
    """Attention over all earlier tokens; options as in `AttentionConfig`."""

    def build(self, width: int) -> FullAttention:
        """The module for model width D."""
        return FullAttention(self, width)

    def state_bytes(self, context: int, dtype: torch.dtype, width: int | None = None) -> int:
        """See `MixerConfig.state_bytes`."""
        return self.cache_bytes(max(-(-context // BLOCK), 1) * BLOCK, dtype)


@dataclass
class FullAttentionState(KeyValueState):
    """Keys and values of every token so far, in blocks of 64 slots: the one state that grows, and so moves."""

    def append(self, k: Tensor, v: Tensor, counts: Tensor) -> int:
        """See `KeyValueState.append`; makes room first, which reads the lengths on the host."""
        needed = int((self.length + counts).max()) if len(counts) else 0
        if needed > self.slots:
            self._resize(-(-needed // BLOCK) * BLOCK)
        super().append(k, v, counts)
        return max(needed, 1)

    def reset(self) -> None:
        """Back to the empty state of one block."""
        self._resize(BLOCK)
        super().reset()

    def _require_fitting(self, saved: Mapping[str, Tensor]) -> None:
        """Of any number of slots, if keys and values have the same."""
        k, v = saved["k"], saved["v"]
        if k.ndim == v.ndim == self.k.ndim and k.shape[1] == v.shape[1] > 0:
            saved = {
                **saved,
                "k": k[:, :1].expand(-1, self.slots, -1, -1),
                "v": v[:, :1].expand(-1, self.slots, -1, -1),
            }
        super()._require_fitting(saved)

    def _take(self, saved: Mapping[str, Tensor]) -> None:
        self._resize(saved["k"].shape[1])
        super()._take(saved)

    def put_rows(self, index: Tensor, rows: Self) -> None:
        """See `State.put_rows`; takes rows of any length."""
        slots = max(self.slots, rows.slots)
        self._resize(slots)
        if rows.slots < slots:
            rows = rows.clone()
            rows._resize(slots)
        super().put_rows(index, rows)

    def _resize(self, slots: int) -> None:
        if slots == self.slots:
            return
        kept = min(slots, self.slots)
        for name in ("k", "v"):
            old = getattr(self, name)
            fresh = zero_slots(old.shape[0], slots, old.shape[2], old.shape[3], old.device, old.dtype)
            fresh[:, :kept] = old[:, :kept]
            setattr(self, name, fresh)


class FullAttention(Attention):
    """Causal grouped-query attention over all earlier tokens, as in Qwen2.5-VL's decoder."""

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> FullAttentionState:
        """See `Mixer.init_state`."""
        return FullAttentionState(*self.empty_cache(BLOCK, batch, device, dtype))
