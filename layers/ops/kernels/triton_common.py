"""What the Triton kernels share: launching, sizes and checks."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
import triton
from torch import Tensor

from hybridvl.layers.errors import ConfigError

INTERPRETED: bool = triton.knobs.runtime.interpret


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launches inside go to the device of x."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def check_contiguous(op: str, states: Mapping[str, Tensor]) -> None:
    """Raise ConfigError unless the states, which kernels write in place, are contiguous."""
    for name, state in states.items():
        if not state.is_contiguous():
            raise ConfigError(
                f"{op}: {name} has strides {state.stride()} for shape {tuple(state.shape)}, "
                "expected a contiguous tensor for backend 'triton'"
            )


def processors(x: Tensor) -> int:
    """Multiprocessors of the device of x."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


def power_of_two(size: int, least: int = 1) -> int:
    """The smallest power of two that is no less than either."""
    return max(triton.next_power_of_2(size), least)
