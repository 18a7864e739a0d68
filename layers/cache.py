"""The cache of softmax attention: keys and values in slots, a ring when the number of slots is fixed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hybridvl.layers.base import State


@dataclass
class KeyValueState(State):
    """Keys (after rotary) and values of the S tokens seen last: token p of a row lies in slot p mod S.

    k, v: (B, S, H, K). length: (B,) int64, real tokens each row has seen; padding is neither stored nor counted.
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
        newest = min(k.shape[1], self.slots)
        offsets = torch.arange(newest, device=k.device)
        source = (counts[:, None] - newest).clamp(min=0) + offsets  # (B, newest), in the new tokens
        slot = (self.length[:, None] + source) % self.slots  # no slot twice in a row, as newest <= S
        stored = (source < counts[:, None])[..., None, None]
        row = torch.arange(k.shape[0], device=k.device)[:, None]
        for buffer, new in ((self.k, k), (self.v, v)):
            # Padding writes back what its slot holds: shapes stay independent of the data.
            buffer[row, slot] = torch.where(stored, new[row, source].to(buffer.dtype), buffer[row, slot])
        self.length += counts
        return self.slots
