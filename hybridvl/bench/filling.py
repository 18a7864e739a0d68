"""States as if a long context had been read: what decoding costs there does not depend on what was read."""

from __future__ import annotations

import dataclasses

import torch

from hybridvl.layers.base import State
from hybridvl.layers.cache import KeyValueState
from hybridvl.layers.full import FullAttentionState
from hybridvl.models.decoder import ModelState
from hybridvl.models.vlm import VisionLanguageModel


@torch.no_grad()
def filled_state(model: VisionLanguageModel, context: int, seed: int = 0) -> ModelState:
    """A state of one row that counts `context` tokens, its caches and recurrent parts full of small noise."""
    generator = torch.Generator().manual_seed(seed)
    state = model.init_state(1)
    for layer in state.layers:
        fill_layer(layer, context, generator)
    state.length.fill_(context)
    return state


@torch.no_grad()
def fill_layer(state: State, context: int, generator: torch.Generator) -> None:
    """Fill the state of one layer, empty before, as `filled_state` does."""
    if isinstance(state, KeyValueState):
        kept = context if isinstance(state, FullAttentionState) else min(context, state.slots)
        rows, _, heads, dim = state.k.shape
        k, v = (
            torch.randn(rows, kept, heads, dim, generator=generator).to(state.k.device, state.k.dtype) for _ in range(2)
        )
        state.length.fill_(context - kept)
        if isinstance(state, FullAttentionState):
            state.length.zero_()
        state.append(k, v, torch.full_like(state.length, kept))
        return
    for field in dataclasses.fields(state):  # type: ignore[arg-type]
        value = getattr(state, field.name)
        if isinstance(value, State):
            fill_layer(value, context, generator)
        elif isinstance(value, tuple | list):
            for part in value:
                fill_layer(part, context, generator)
        elif value.is_floating_point():
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))
