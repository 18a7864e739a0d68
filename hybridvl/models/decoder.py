"""The language model's stack of layers, built from mixer configurations, and the state it keeps between calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hybridvl.layers import MixerConfig, Sequence, State
from hybridvl.layers.norms import RMSNorm
from hybridvl.layers.ops.one_row import one_row_products
from hybridvl.models.block import Block


@dataclass
class ModelState(State):
    """What a model remembers between calls; one row per sequence (or per packed segment).

    layers: the state of every layer's mixer. length: (B,) int64, real tokens seen. rope_delta: (B,) int64, what must
    be added to `length` to get the position of the next token, since an image takes fewer positions than tokens. A
    call goes on one past the largest position so far. Within one call the same holds but for "v523" videos that reach
    further than the text after them: there, cut a prompt before the video or pass position_ids.
    """

    layers: list[State]
    length: Tensor
    rope_delta: Tensor

    @property
    def next_position(self) -> Tensor:
        """(B,) int64: rotary position of the next token, the same on all three axes."""
        return self.length + self.rope_delta

    def advance(self, tokens: Tensor, ends: Tensor) -> None:
        """Count `tokens` (B,) more real tokens, whose largest positions are `ends` (B,) - 1; in place."""
        ends = torch.maximum(self.next_position, ends)
        self.length += tokens
        self.rope_delta.copy_(ends - self.length)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Self:
        layers = [layer._mapped(change) for layer in self.layers]
        return dataclasses.replace(self, layers=layers, length=change(self.length), rope_delta=change(self.rope_delta))

    def _children(self) -> list[tuple[str, Tensor | State]]:
        named: list[tuple[str, Tensor | State]] = [(f"layers.{i}", layer) for i, layer in enumerate(self.layers)]
        return [*named, ("length", self.length), ("rope_delta", self.rope_delta)]


class Decoder(nn.Module):
    """Embedding, layers and final norm; knows the mixers only through their configurations."""

    def __init__(
        self,
        mixers: AbstractSequence[MixerConfig],
        width: int,
        mlp_width: int,
        vocab_size: int,
        norm_eps: float,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(Block(mixer, width, mlp_width, norm_eps) for mixer in mixers)
        self.norm = RMSNorm(width, norm_eps)
        self.activation_checkpointing = activation_checkpointing

    def init_states(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> list[State]:
        """An empty state per layer for `batch` rows; device and dtype default to the parameters'."""
        return [block.mixer.init_state(batch, device, dtype) for block in self._blocks()]

    def forward(
        self,
        x: Tensor,
        sequence: Sequence,
        states: list[State] | None = None,
        collected: list[Tensor] | None = None,
    ) -> Tensor:
        """Embeddings x (B, T, D) to the final hidden states (B, T, D), after the norm.

        states: one per layer, updated in place. collected: a list that receives x, the output of every layer but the
        last, and the result: layers + 1 tensors.
        """
        recompute = self.activation_checkpointing and torch.is_grad_enabled() and states is None
        with one_row_products(x):
            for i, layer in enumerate(self.layers):
                if collected is not None:
                    collected.append(x)
                if recompute:
                    x = checkpoint(layer, x, sequence, use_reentrant=False)
                else:
                    x = layer(x, sequence, None if states is None else states[i])
        x = self.norm(x)
        if collected is not None:
            collected.append(x)
        return x

    def _blocks(self) -> list[Block]:
        return [block for block in self.layers if isinstance(block, Block)]
