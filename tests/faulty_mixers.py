"""Mixers of which one thing is wrong: a fault for each property that `check_mixer` knows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hybridvl.layers import Mixer, MixerConfig, Sequence, State
from hybridvl.layers.gdn import GatedDeltaNetConfig

GDN = GatedDeltaNetConfig(heads=2, head_dim=8)

# A fault of calls: how a healthy mixer is called wrongly. The arguments are those of `Mixer.forward` behind the mixer.
Call = Callable[[Mixer, Tensor, Sequence, State | None], Tensor]


def _no_state(mixer: Mixer, x: Tensor, sequence: Sequence, state: State | None) -> Tensor:
    return mixer(x, sequence)


def _remembers_in_the_module(mixer: Mixer, x: Tensor, sequence: Sequence, state: State | None) -> Tensor:
    calls = getattr(mixer, "calls", 0)
    object.__setattr__(mixer, "calls", calls + 1)
    return mixer(x, sequence, state) * (1 + 1e-6 * calls)


def _wrong_dtype(mixer: Mixer, x: Tensor, sequence: Sequence, state: State | None) -> Tensor:
    return mixer(x, sequence, state).to(torch.float64 if x.dtype == torch.float32 else torch.float32)


def _not_a_number(mixer: Mixer, x: Tensor, sequence: Sequence, state: State | None) -> Tensor:
    return mixer(x, sequence, state) * float("nan")


def _sees_the_next_token(mixer: Mixer, x: Tensor, sequence: Sequence, state: State | None) -> Tensor:
    return mixer(x, sequence, state) + 1e-3 * x.roll(-1, dims=1)


def _sees_the_last_token(mixer: Mixer, x: Tensor, sequence: Sequence, state: State | None) -> Tensor:
    return mixer(x, sequence, state) + 1e-3 * x[:, -1:]


def _mixes_rows(mixer: Mixer, x: Tensor, sequence: Sequence, state: State | None) -> Tensor:
    return mixer(x, sequence, state) + 1e-3 * x.mean(dim=0)


def _forgets_in_chunks(mixer: Mixer, x: Tensor, sequence: Sequence, state: State | None) -> Tensor:
    if state is not None and x.shape[1] > 1:
        state.reset()
    return mixer(x, sequence, state)


def _forgets_in_steps(mixer: Mixer, x: Tensor, sequence: Sequence, state: State | None) -> Tensor:
    y = mixer(x, sequence, state)
    if state is not None and x.shape[1] == 1:
        state.tensors()["conv_k"][..., -1].zero_()
    return y


def _detaches_the_state(mixer: Mixer, x: Tensor, sequence: Sequence, state: State | None) -> Tensor:
    y = mixer(x, sequence, state)
    if state is not None:
        state.detach_()
    return y


def _ignores_boundaries(mixer: Mixer, x: Tensor, sequence: Sequence, state: State | None) -> Tensor:
    return mixer(x, Sequence(sequence.rotary, sequence.mask), state)


def _leak(x: Tensor) -> Tensor:
    """Zero, with a gradient into every token before."""
    return 1e-3 * (x.cumsum(dim=1) - x.detach().cumsum(dim=1))


def _leaks_gradients_between_segments(mixer: Mixer, x: Tensor, sequence: Sequence, state: State | None) -> Tensor:
    y = mixer(x, sequence, state)
    return y if sequence.cu_seqlens is None else y + _leak(x)


def _leaks_gradients_into_padding(mixer: Mixer, x: Tensor, sequence: Sequence, state: State | None) -> Tensor:
    y = mixer(x, sequence, state)
    return y if sequence.mask is None else y + _leak(x)


def _ignores_padding(mixer: Mixer, x: Tensor, sequence: Sequence, state: State | None) -> Tensor:
    return mixer(x, Sequence(sequence.rotary, None, sequence.cu_seqlens), state)


def _believes_padding_is_left(mixer: Mixer, x: Tensor, sequence: Sequence, state: State | None) -> Tensor:
    if sequence.mask is None:
        return mixer(x, sequence, state)
    return mixer(x, Sequence(sequence.rotary, sequence.mask.sort(dim=1).values), state)


def _believes_padding_is_outside(mixer: Mixer, x: Tensor, sequence: Sequence, state: State | None) -> Tensor:
    if sequence.mask is None:
        return mixer(x, sequence, state)
    seen = sequence.mask.long().cumsum(1) > 0
    to_come = sequence.mask.long().flip(1).cumsum(1).flip(1) > 0
    return mixer(x, Sequence(sequence.rotary, seen & to_come), state)


def _counts_calls(mixer: Mixer, x: Tensor, sequence: Sequence, state: State | None) -> Tensor:
    y = mixer(x, sequence, state)
    if state is not None:
        state.tensors()["recurrent"].add_(1e-4)
    return y


def _swaps_segments(mixer: Mixer, x: Tensor, sequence: Sequence, state: State | None) -> Tensor:
    y = mixer(x, sequence, state)
    if state is not None and sequence.cu_seqlens is not None:
        recurrent = state.tensors()["recurrent"]
        recurrent.copy_(recurrent.flip(0))
    return y


def _keeps_padding_in_the_state(mixer: Mixer, x: Tensor, sequence: Sequence, state: State | None) -> Tensor:
    if state is None or sequence.mask is None:
        return mixer(x, sequence, state)
    y = mixer(x, sequence, state.clone())
    mixer(x, Sequence(sequence.rotary), state)
    return y


def _moves_the_state(mixer: Mixer, x: Tensor, sequence: Sequence, state: State | None) -> Tensor:
    y = mixer(x, sequence, state)
    if isinstance(state, NarrowableState):
        state.recurrent = state.recurrent.clone()
    return y


def _narrows_the_state(mixer: Mixer, x: Tensor, sequence: Sequence, state: State | None) -> Tensor:
    if not isinstance(state, NarrowableState) or x.dtype != torch.bfloat16:
        return mixer(x, sequence, state)
    narrow, state.recurrent = state.recurrent, state.recurrent.float()
    y = mixer(x, sequence, state)
    state.recurrent = narrow.copy_(state.recurrent)
    return y


CALL_FAULTS: dict[str, tuple[str, Call]] = {
    "remembers in the module": ("output", _remembers_in_the_module),
    "wrong dtype": ("output", _wrong_dtype),
    "not a number": ("output", _not_a_number),
    "sees the next token": ("causality", _sees_the_next_token),
    "sees the last token": ("causality", _sees_the_last_token),
    "mixes rows": ("rows", _mixes_rows),
    "no state": ("chunks", _no_state),
    "forgets in chunks": ("chunks", _forgets_in_chunks),
    "forgets in steps": ("steps", _forgets_in_steps),
    "detaches the state": ("chunk gradients", _detaches_the_state),
    "ignores boundaries": ("packing", _ignores_boundaries),
    "leaks gradients between segments": ("packing gradients", _leaks_gradients_between_segments),
    "ignores padding": ("left padding", _ignores_padding),
    "believes padding is left": ("right padding", _believes_padding_is_left),
    "believes padding is outside": ("scattered padding", _believes_padding_is_outside),
    "leaks gradients into padding": ("padding gradients", _leaks_gradients_into_padding),
    "counts calls": ("final state", _counts_calls),
    "swaps segments": ("packed state", _swaps_segments),
    "keeps padding in the state": ("padded state", _keeps_padding_in_the_state),
    "moves the state": ("fixed addresses", _moves_the_state),
    "narrows the state": ("wide recurrence", _narrows_the_state),
}


@dataclass
class NarrowableState(State):
    """Gated DeltaNet's state, with methods that can be broken."""

    recurrent: Tensor
    conv_q: Tensor
    conv_k: Tensor
    conv_v: Tensor


def _shares_a_tensor(state: NarrowableState) -> State:
    return dataclasses.replace(state, conv_q=state.conv_q.clone(), conv_k=state.conv_k.clone())


def _resets_the_recurrence_alone(state: NarrowableState) -> None:
    state.recurrent.zero_()


STATE_FAULTS: dict[str, tuple[str, str, Callable[..., object]]] = {
    "reset does nothing": ("reset", "reset", lambda state: None),
    "reset forgets the convolutions": ("reset", "reset", _resets_the_recurrence_alone),
    "clone is the state itself": ("clone", "clone", lambda state: state),
    "clone shares a tensor": ("clone", "clone", _shares_a_tensor),
    "state_dict lacks a tensor": ("state_dict", "state_dict", lambda state: {"recurrent": state.recurrent}),
    "load_state_dict does nothing": ("state_dict", "load_state_dict", lambda state, saved: None),
}
COST_FAULTS = ("state_bytes", "num_params", "flops")


class Faulty(Mixer):
    """A Gated DeltaNet with one fault."""

    def __init__(self, config: FaultyConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.inner = config.inner.build(width)

    def forward(self, x: Tensor, sequence: Sequence, state: State | None = None) -> Tensor:
        if self.config.fault in CALL_FAULTS:
            return CALL_FAULTS[self.config.fault][1](self.inner, x, sequence, state)
        return self.inner(x, sequence, state)

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        healthy = self.inner.init_state(batch, device, dtype)
        if not isinstance(self.config.inner, GatedDeltaNetConfig):
            return healthy
        tensors = healthy.tensors()
        if self.config.fault == "narrows the state" and dtype == torch.bfloat16:
            tensors["recurrent"] = tensors["recurrent"].bfloat16()
        methods = {}
        if self.config.fault in STATE_FAULTS:
            _, method, broken = STATE_FAULTS[self.config.fault]
            methods[method] = broken
        kind = type("FaultyState", (NarrowableState,), methods)
        return kind(**tensors)


@dataclass(frozen=True, kw_only=True)
class FaultyConfig(MixerConfig):
    """A mixer of which one thing is wrong."""

    fault: str
    inner: MixerConfig = field(default_factory=lambda: GDN)

    @property
    def rotary_dims(self) -> frozenset[int]:
        return self.inner.rotary_dims

    def build(self, width: int) -> Mixer:
        return Faulty(self, width)

    def num_params(self, width: int) -> int:
        return self.inner.num_params(width) + (self.fault == "num_params")

    def flops(self, width: int, tokens: int, context: int = 0) -> int:
        return self.inner.flops(width, tokens, context) + 2 * (self.fault == "flops")

    def state_bytes(self, context: int, dtype: torch.dtype, width: int | None = None) -> int:
        return self.inner.state_bytes(context, dtype, width) + 4 * (self.fault == "state_bytes")


PLANTED = (
    [(fault, prop) for fault, (prop, _) in CALL_FAULTS.items()]
    + [(fault, prop) for fault, (prop, _, _) in STATE_FAULTS.items()]
    + [(prop, prop) for prop in COST_FAULTS]
)
"""(fault, the property that it breaks)."""
