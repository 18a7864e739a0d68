"""Properties of a mixer's state: what it holds, its copies, and where it lies."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hybridvl.layers.base import State
from hybridvl.testing.subject import Comparison, Property, Subject, compare_states


@torch.no_grad()
def _final_state(subject: Subject) -> Iterator[Comparison]:
    """The state after one pass, chunks and steps is the same."""
    whole = _state_after(subject, [subject.tokens])
    for what, sizes in (("in chunks", subject.sizes), ("token by token", [1] * subject.tokens)):
        yield from compare_states(what, _state_after(subject, sizes), whole)


@torch.no_grad()
def _packed_state(subject: Subject) -> Iterator[Comparison]:
    """Each row of a packed call's state is that of its segment alone."""
    x, sizes = subject.x[:1], subject.sizes
    state = subject.mixer.init_state(len(sizes))
    subject.run_packed(x, sizes, state)
    for row, part in enumerate(x.split(sizes, dim=1)):
        alone = subject.mixer.init_state(1)
        subject.run(part, alone)
        yield from compare_states(f"packed segment {row}", state, alone, (row, 0))


@torch.no_grad()
def _padded_state(subject: Subject) -> Iterator[Comparison]:
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
def _reset(subject: Subject) -> Iterator[Comparison]:
    """A reset state is as good as new."""
    state = _state_after(subject, subject.sizes)
    state.reset()
    yield from compare_states("after reset", state, subject.mixer.init_state(subject.batch))
    yield "outputs after reset", subject.run(subject.x, state), subject.run(subject.x)


@torch.no_grad()
def _clone(subject: Subject) -> Iterator[Comparison]:
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
def _round_trip(subject: Subject) -> Iterator[Comparison]:
    """state_dict and load_state_dict carry a state over to a new one."""
    state = _state_after(subject, subject.sizes)
    restored = subject.mixer.init_state(subject.batch)
    restored.load_state_dict({name: tensor.clone() for name, tensor in state.state_dict().items()})
    yield from compare_states("after load_state_dict", restored, state)
    more = subject.noise(subject.batch, 5, subject.width)
    outputs = [subject.run(more, one, subject.tokens) for one in (restored, state)]
    yield "outputs after load_state_dict", outputs[0], outputs[1]


@torch.no_grad()
def _fixed_addresses(subject: Subject) -> Iterator[Comparison]:
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


def _neither_kept_nor_copied(old: Tensor, new: Tensor, other: Tensor) -> Tensor:
    """The share of numbers that one more token has recomputed from the past, (1,) float64; 0 below a quarter.

    Kept: as before, in place or moved by one along an axis. Copied from the token: the same after another history.
    """
    explained = (new == old) | (new == other)
    for axis in range(1, new.dim()):
        explained |= (new == old.roll(1, axis)) | (new == old.roll(-1, axis))
    share = 1 - explained.double().mean()
    return torch.where(share > 0.25, share, 0.0).reshape(1)


def _addresses(state: State) -> Tensor:
    """Addresses in halves, and sizes: numbers that float64 tells apart relative to their maximum."""
    found = [(*divmod(tensor.data_ptr(), 1 << 24), tensor.numel()) for tensor in state.tensors().values()]
    return torch.tensor(found, dtype=torch.float64)


@torch.no_grad()
def _wide_recurrence(subject: Subject) -> Iterator[Comparison]:
    """In a bfloat16 model the state keeps in bfloat16 only what it copies, never what it computes from its past."""
    mixer, dtype = subject.mixer.to(torch.bfloat16), torch.bfloat16
    histories = [subject.noise(1, subject.tokens, subject.width).to(dtype) for _ in range(2)]
    token = subject.noise(1, 1, subject.width).to(dtype)
    before, after = [], []
    for history in histories:
        state = mixer.init_state(1, dtype=dtype)
        subject.run(history, state)
        before.append(state.clone().tensors())
        subject.run(token, state, subject.tokens)
        after.append(state.tensors())
    for name, new in after[0].items():
        old, other = before[0][name], after[1][name]
        if new.dtype == dtype and new.shape == old.shape:
            computed = _neither_kept_nor_copied(old, new, other)
            yield f"state tensor {name} in bfloat16 is recomputed from itself", computed, torch.zeros_like(computed)


STATES: dict[str, Property] = {
    "final state": _final_state,
    "packed state": _packed_state,
    "padded state": _padded_state,
    "reset": _reset,
    "clone": _clone,
    "state_dict": _round_trip,
    "fixed addresses": _fixed_addresses,
    "wide recurrence": _wide_recurrence,
}
"""Name of each property -> the comparisons that show it."""
