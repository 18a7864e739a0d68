"""Sliding-window attention over a ring buffer of constant size."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hybridvl.layers.cache import KeyValueState
from hybridvl.layers.registry import register
from hybridvl.layers.softmax_attention import Attention, AttentionConfig
from hybridvl.layers.validate import expect_at_least


@register("swa")
@dataclass(frozen=True, kw_only=True)
class SlidingWindowConfig(AttentionConfig):
    """Attention over the last W tokens; the defaults are InfiniteVL's, further options as in `AttentionConfig`.

    Attributes:
        window: tokens W that a query sees, itself included.
    """

    weightless = AttentionConfig.weightless | {"window"}

    window: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_at_least(self, 1, "window")

    @property
    def slots_limit(self) -> int:
        """W."""
        return self.window

    def build(self, width: int) -> SlidingWindowAttention:
        """The module for model width D."""
        return SlidingWindowAttention(self, width)

    def state_bytes(self, context: int, dtype: torch.dtype, width: int | None = None) -> int:
        """See `MixerConfig.state_bytes`; the same for every context."""
        return self.cache_bytes(self.window, dtype)


class SlidingWindowAttention(Attention):
    """Causal grouped-query attention over a window, as in InfiniteVL; its state never moves or grows."""

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> KeyValueState:
        """See `Mixer.init_state`."""
        return KeyValueState(*self.empty_cache(self.config.slots_limit or 0, batch, device, dtype))
