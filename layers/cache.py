"""The cache of softmax attention: keys and values in slots, a ring when the number of slots is fixed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hybridvl.layers.base import State
from hybridvl.layers.ops.checks import readable_on_host
from hybridvl.layers.ops.slots import store_in_slots


@dataclass
class KeyValueState(State):
    """Keys (after rotary) and values of the S tokens seen last: token p of a row lies in slot p mod S.

    k, v: (B, S, H, K), as `zero_slots` lays them out. length: (B,) int64, real tokens each row has seen; padding is
    neither stored nor counted.
    """

    k: Tensor
    v: Tensor
    length: Tensor

    @property
    def slots(self) -> int:
        """S, the number of slots of a row."""
        return self.k.shape[1]

    def positions(self) -> Tensor:
        """(B, S) int64: the position of the token in each slot, negative where the slot is empty."""
        last = self.length[:, None] - 1
        return last - (last - torch.arange(self.slots, device=last.device)) % self.slots

    def append(self, k: Tensor, v: Tensor, counts: Tensor) -> int:
        """Store the first counts (B,) of the T tokens k, v (B, T, H, K) of each row; return the number of slots in use.

        Of more than S tokens only the last S are kept.
        """
        if readable_on_host(self.length) and len(counts):
            lengths, stored = self.length.tolist(), counts.tolist()
            if len(set(lengths)) == 1 and len(set(stored)) == 1:
                self._append_slices(k, v, lengths[0], stored[0])
                self.length += counts
                return min(lengths[0] + stored[0], self.slots)
        store_in_slots(k, v, self.k, self.v, self.length, counts)
        self.length += counts
        return self.slots

    def _append_slices(self, k: Tensor, v: Tensor, length: int, count: int) -> None:
        """Rows of one length and one number of new tokens: one slice of the slots, or two around the ring's end."""
        kept = min(count, self.slots)
        slot = (length + count - kept) % self.slots
        first = min(kept, self.slots - slot)
        for buffer, new in ((self.k, k), (self.v, v)):
            buffer[:, slot : slot + first] = new[:, count - kept : count - kept + first]
            if first < kept:
                buffer[:, : kept - first] = new[:, count - kept + first : count]


def zero_slots(
    batch: int, slots: int, heads: int, dim: int, device: torch.device | str | None, dtype: torch.dtype
) -> Tensor:
    """Zeros (B, S, H, K) that lie in memory as (B, H, S, K): what a head reads is in one piece.

    Not a transposed view: `State.detach_` works in place.
    """
    strides = (heads * slots * dim, dim, slots * dim, 1)
    return torch.empty_strided((batch, slots, heads, dim), strides, device=device, dtype=dtype).zero_()
