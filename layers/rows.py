"""Rows whose real tokens come first: the one form in which a mixer has to handle padded and packed input."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from hybridvl.layers.base import Mixer, RotaryTable, Sequence, State
from hybridvl.layers.ops.checks import check_segments
from hybridvl.layers.ops.packing import pad_packed, unpad_packed


class RowMixer(Mixer):
    """A mixer that implements `mix` for aligned rows only; `forward` brings every input into that form and back.

    Aligned means one of:
    - no mask, no cu_seqlens: every token of x (B, T, D) is real;
    - a mask whose True stand left of its False (padding right), with x zero at the padding;
    - cu_seqlens, and then state is None (packed training, B = 1). With a state, segments become padded rows first.

    A causal mixer then needs to do one thing about padding: keep it out of the state, which after a call must be what
    the real tokens alone leave behind. Outputs at padding are zeroed here.
    """

    rotary_dim: int = 0  # head dim of the tables that `mix` reads

    @abstractmethod
    def mix(self, x: Tensor, sequence: Sequence, state: State | None) -> Tensor:
        """Mix aligned x (B, T, D) into (B, T, D); update the state in place if there is one."""

    def forward(self, x: Tensor, sequence: Sequence, state: State | None = None) -> Tensor:
        """See `Mixer.forward`."""
        boundaries = sequence.cu_seqlens
        if state is not None:
            check_segments(type(self).__name__, boundaries, *x.shape[:2])
            _check_rows(x, sequence, state)
        if sequence.mask is not None:
            return self._mix_padded(x, sequence, sequence.mask, state)
        if boundaries is None or state is None:
            return self.mix(x, sequence, state)
        lengths = boundaries.diff()
        rows = pad_packed(x, boundaries)  # (N, Tmax, D)
        mask = torch.arange(rows.shape[1], device=x.device) < lengths[:, None]  # (N, Tmax)
        rotary = {dim: (pad_packed(c, boundaries), pad_packed(s, boundaries)) for dim, (c, s) in self._tables(sequence)}
        return unpad_packed(self.mix(rows, Sequence(rotary, mask), state), boundaries)

    def _mix_padded(self, x: Tensor, sequence: Sequence, mask: Tensor, state: State | None) -> Tensor:
        # Sorting by "is padding" is stable: it moves each row's real tokens to the left in their order.
        order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)  # (B, T)
        rows = _take(x.masked_fill(~mask[..., None], 0), order)
        rotary: RotaryTable = {dim: (_take(c, order), _take(s, order)) for dim, (c, s) in self._tables(sequence)}
        y = self.mix(rows, Sequence(rotary, mask.gather(1, order)), state)
        return _take(y, torch.argsort(order, dim=1)).masked_fill(~mask[..., None], 0)

    def _tables(self, sequence: Sequence) -> list[tuple[int, tuple[Tensor, Tensor]]]:
        return [(dim, table) for dim, table in sequence.rotary.items() if dim == self.rotary_dim]


def is_step(x: Tensor, sequence: Sequence) -> bool:
    """Whether aligned x (B, T, D) is one real token in every row, and autograd does not record."""
    return x.shape[1] == 1 and sequence.mask is None and not torch.is_grad_enabled()


def token_counts(x: Tensor, sequence: Sequence) -> Tensor:
    """Real tokens in each row of aligned x (B, T, D): (B,) int64."""
    if sequence.mask is None:
        return torch.full((x.shape[0],), x.shape[1], dtype=torch.int64, device=x.device)
    return sequence.mask.sum(dim=1)


def zero_padding(x: Tensor, sequence: Sequence) -> Tensor:
    """x (B, T, ...) with zeros at the padding."""
    if sequence.mask is None:
        return x
    return x.masked_fill(~sequence.mask.reshape(*sequence.mask.shape, *[1] * (x.dim() - 2)), 0)


def readable(tensor: Tensor) -> Tensor:
    """A state tensor as an operator's input: a copy when autograd records, for the state is overwritten afterwards."""
    return tensor.clone() if torch.is_grad_enabled() else tensor


def _take(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))


def _check_rows(x: Tensor, sequence: Sequence, state: State) -> None:
    rows = x.shape[0] if sequence.cu_seqlens is None else sequence.cu_seqlens.numel() - 1
    for name, tensor in state.tensors().items():
        if tensor.shape[0] != rows:
            raise ValueError(f"state has {tensor.shape[0]} rows ({name}), the input has {rows} rows or segments")
