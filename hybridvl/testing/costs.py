"""Properties of a mixer's declared costs: parameters, FLOPs and state bytes are what the module has."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hybridvl.layers.base import State
from hybridvl.testing.subject import Comparison, Property, Subject


@torch.no_grad()
def _state_bytes(subject: Subject) -> Iterator[Comparison]:
    """`state_bytes` is what a state holds, in every dtype and as the context grows."""
    for dtype in (subject.dtype, torch.bfloat16):
        mixer = subject.mixer.to(dtype)
        state = mixer.init_state(subject.batch, dtype=dtype)
        context = 0
        for size in (0, 1, *subject.sizes):
            if size:
                subject.run(subject.noise(subject.batch, size, subject.width).to(dtype), state, context)
            context += size
            declared = subject.batch * subject.state_bytes(context, dtype)
            what = f"{subject.batch} rows after {context} tokens in {dtype}"
            yield f"nbytes of {what}: allocated {state.nbytes}, declared {declared}", *_pair(state.nbytes, declared)


def _num_params(subject: Subject) -> Iterator[Comparison]:
    """`num_params` counts the module's parameters, built on the meta device, too."""
    declared = subject.config.num_params(subject.width)
    with torch.device("meta"):
        meta = subject.config.build(subject.width)
    for where, module in (("the meta device", meta), ("the CPU", subject.mixer)):
        built = sum(parameter.numel() for parameter in module.parameters())
        yield f"parameters: built on {where} {built}, declared {declared}", *_pair(built, declared)


@torch.no_grad()
def _flops(subject: Subject) -> Iterator[Comparison]:
    """`flops` is what FlopCounterMode counts, without a state, and for chunks and a step that go on from one."""
    for tokens in (1, 7, subject.tokens):
        yield _counted(subject, tokens, None, 0)
    state = subject.mixer.init_state(1)
    subject.run(subject.x[:1], state)
    context = subject.tokens
    for tokens in (1, 7, subject.tokens):
        yield _counted(subject, tokens, state, context)
        context += tokens


def _counted(subject: Subject, tokens: int, state: State | None, context: int) -> Comparison:
    x = subject.noise(1, tokens, subject.width)
    # The CPU's fused attention is not in the counter's table; the mathematical form has the same products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        subject.run(x, state, context)
    counted, declared = counter.get_total_flops(), subject.config.flops(subject.width, tokens, context)
    return f"FLOPs of {tokens} after {context}: counted {counted}, declared {declared}", *_pair(counted, declared)


def _pair(found: int, declared: int) -> tuple[Tensor, Tensor]:
    return torch.tensor([found], dtype=torch.float64), torch.tensor([declared], dtype=torch.float64)


COSTS: dict[str, Property] = {
    "state_bytes": _state_bytes,
    "num_params": _num_params,
    "flops": _flops,
}
"""Name of each property -> the comparisons that show it."""
