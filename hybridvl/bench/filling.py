"""States as if a long context had been read, and brought back there: what going on costs hangs on nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hybridvl.layers.base import State
from hybridvl.layers.cache import KeyValueState
from hybridvl.layers.full import BLOCK, FullAttentionState
from hybridvl.models.decoder import ModelState
from hybridvl.models.vlm import VisionLanguageModel


@torch.no_grad()
def filled_state(model: VisionLanguageModel, context: int, seed: int = 0) -> ModelState:
    """A state of one row that counts `context` tokens, its caches and recurrent parts full of small noise; of 0 tokens,
    an empty one."""
    generator = torch.Generator().manual_seed(seed)
    state = model.init_state(1)
    for layer in state.layers if context else []:
        fill_layer(layer, context, generator)
    state.length.fill_(context)
    return state


def rewinder(state: ModelState, tokens: int) -> Callable[[], None]:
    """What brings a state back to the context that it has now, after runs of `tokens` tokens each.

    Counters go back, and so does the room of full attention where every run must make some, as it takes a block or
    more; where few runs would, it is left. Values stay as runs leave them: no time hangs on those.
    """
    counters = {name: tensor.clone() for name, tensor in state.tensors().items() if not tensor.is_floating_point()}
    caches = [(cache, cache.slots) for cache in _growing(state)] if tokens >= BLOCK else []

    def rewind() -> None:
        tensors = state.tensors()
        for name, counter in counters.items():
            tensors[name].copy_(counter)
        for cache, slots in caches:
            cache.k, cache.v = cache.k[:, :slots], cache.v[:, :slots]

    return rewind


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
    for part in _parts(state):
        if isinstance(part, State):
            fill_layer(part, context, generator)
        elif part.is_floating_point():
            part.copy_(0.1 * torch.randn(part.shape, generator=generator))


def _growing(state: State) -> Iterator[FullAttentionState]:
    if isinstance(state, FullAttentionState):
        yield state
        return
    for part in _parts(state):
        if isinstance(part, State):
            yield from _growing(part)


def _parts(state: State) -> Iterator[State | Tensor]:
    for field in dataclasses.fields(state):  # type: ignore[arg-type]
        value = getattr(state, field.name)
        yield from value if isinstance(value, tuple | list) else [value]
