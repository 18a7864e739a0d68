"""Properties of a mixer's state: what it holds, its copies, and where it lies."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hybridvl.layers.base import State
from hybridvl.testing.subject import Comparison, Subject, compare_states


@torch.no_grad()
def final_state(subject: Subject) -> Iterator[Comparison]:
    """The state after one pass, chunks and steps is the same."""
    whole = _state_after(subject, [subject.tokens])
    for what, sizes in (("in chunks", subject.sizes), ("token by token", [1] * subject.tokens)):
        yield from compare_states(what, _state_after(subject, sizes), whole)


@torch.no_grad()
def packed_state(subject: Subject) -> Iterator[Comparison]:
    """Each row of a packed call's state is that of its segment alone."""
    x, sizes = subject.x[:1], subject.sizes
    state = subject.mixer.init_state(len(sizes))
    subject.run_packed(x, sizes, state)
    for row, part in enumerate(x.split(sizes, dim=1)):
        alone = subject.mixer.init_state(1)
        subject.run(part, alone)
        yield from compare_states(f"packed segment {row}", state, alone, (row, 0))


@torch.no_grad()
def padded_state(subject: Subject) -> Iterator[Comparison]:
    """Padding never reaches the state, not even where a row has nothing else."""
    for side in ("left", "right", "scattered"):
        x, mask = subject.padded(side)
        state = subject.mixer.init_state(subject.batch)
        subject.run_padded(x, mask, state)
        counts = mask.sum(1)
        only_first = torch.zeros(subject.batch, 3, dtype=torch.bool)
        only_first[0] = True
        more = subject.noise(subject.batch, 3, subject.width)
        subject.run_padded(more, only_first, state, counts)
        for row in range(subject.batch):
            alone = subject.mixer.init_state(1)
            subject.run(x[row : row + 1, mask[row]], alone)
            if row == 0:
                subject.run(more[:1], alone, int(counts[0]))
            yield from compare_states(f"row {row} with {side} padding", state, alone, (row, 0))


@torch.no_grad()
def reset(subject: Subject) -> Iterator[Comparison]:
    """A reset state is as good as new."""
    state = _state_after(subject, subject.sizes)
    state.reset()
    yield from compare_states("after reset", state, subject.mixer.init_state(subject.batch))
    yield "outputs after reset", subject.run(subject.x, state), subject.run(subject.x)


@torch.no_grad()
def clone(subject: Subject) -> Iterator[Comparison]:
    """A clone goes on as the original would, and neither touches the other."""
    state = _state_after(subject, subject.sizes)
    copy = state.clone()
    saved = {name: tensor.clone() for name, tensor in copy.tensors().items()}
    more = subject.noise(subject.batch, 5, subject.width)
    original = subject.run(more, state, subject.tokens)
    for name, tensor in copy.tensors().items():
        yield f"clone's tensor {name} when the original goes on", tensor.double(), saved[name].double()
    moved = {name: tensor.clone() for name, tensor in state.tensors().items()}
    yield "outputs of the clone", subject.run(more, copy, subject.tokens), original
    for name, tensor in state.tensors().items():
        yield f"original's tensor {name} when the clone goes on", tensor.double(), moved[name].double()


@torch.no_grad()
def round_trip(subject: Subject) -> Iterator[Comparison]:
    """state_dict and load_state_dict carry a state over to a new one."""
    state = _state_after(subject, subject.sizes)
    restored = subject.mixer.init_state(subject.batch)
    restored.load_state_dict({name: tensor.clone() for name, tensor in state.state_dict().items()})
    yield from compare_states("after load_state_dict", restored, state)
    more = subject.noise(subject.batch, 5, subject.width)
    outputs = [subject.run(more, one, subject.tokens) for one in (restored, state)]
    yield "outputs after load_state_dict", outputs[0], outputs[1]


@torch.no_grad()
def fixed_addresses(subject: Subject) -> Iterator[Comparison]:
    """A state of constant size is updated in place: its tensors never move."""
    sizes = {subject.state_bytes(context) for context in (0, 1, subject.tokens, 64 * subject.tokens)}
    if len(sizes) > 1:
        return
    state = subject.mixer.init_state(subject.batch)
    before = _addresses(state)
    subject.run_chunks(subject.x, subject.sizes, state)
    yield "addresses of the state's tensors after chunks", _addresses(state), before
    subject.run(subject.x[:, :1], state, subject.tokens)
    yield "addresses of the state's tensors after a step", _addresses(state), before
    saved = {name: tensor.clone() for name, tensor in state.state_dict().items()}
    state.reset()
    yield "addresses of the state's tensors after reset", _addresses(state), before
    state.load_state_dict(saved)
    yield "addresses of the state's tensors after load_state_dict", _addresses(state), before


def _state_after(subject: Subject, sizes: list[int]) -> State:
    state = subject.mixer.init_state(subject.batch)
    subject.run_chunks(subject.x, sizes, state)
    return state


def _addresses(state: State) -> Tensor:
    """Offsets from the lowest address, which float64 holds exactly, and that address in two halves."""
    found = [tensor.data_ptr() for tensor in state.tensors().values()]
    return torch.tensor([part for pointer in found for part in divmod(pointer, 1 << 24)], dtype=torch.float64)
