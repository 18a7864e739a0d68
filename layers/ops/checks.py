"""Checks of operator arguments, and the precision in which operators compute."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping
from collections.abc import Sequence as Items

import torch
from torch import Tensor

from hybridvl.layers.errors import ConfigError


def check_shape(op: str, name: str, tensor: Tensor, letters: str, sizes: Items[int | None]) -> None:
    """Raise ConfigError unless `tensor` has the given sizes (None = any); `letters` says what they mean."""
    shape = tuple(tensor.shape)
    if shape == sizes:  # checks run at every token
        return
    if len(shape) != len(sizes) or any(
        want is not None and got != want for got, want in zip(shape, sizes, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in sizes)
        raise ConfigError(f"{op}: {name} has shape {shape}, expected {letters} = ({wanted})")


def check_floating(op: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Raise ConfigError unless all tensors are floating point and on one device."""
    devices = {}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise ConfigError(f"{op}: {name} has dtype {tensor.dtype}, expected a floating-point dtype")
        devices[tensor.device] = name
    if len(devices) > 1:
        places = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise ConfigError(f"{op}: all tensors must be on one device, got {places}")


def check_segments(op: str, cu_seqlens: Tensor | None, batch: int, tokens: int) -> None:
    """Raise ConfigError unless cu_seqlens is None or integers (N + 1,) of a packed row (batch 1); see `packing`."""
    if cu_seqlens is None:
        return
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2 or cu_seqlens.is_floating_point():
        raise ConfigError(
            f"{op}: cu_seqlens has shape {tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}, "
            "expected integers (N + 1,) with N >= 1"
        )
    if batch != 1:
        raise ConfigError(f"{op}: cu_seqlens needs one packed row, got a batch of {batch}")
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or any(a > b for a, b in itertools.pairwise(bounds)):
        raise ConfigError(f"{op}: cu_seqlens is {bounds}, expected to rise from 0 to the {tokens} tokens of the row")


def internal_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 when any tensor is float64, else float32: what states and sums are kept in."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context in which autocast does not lower the precision of matrix products."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def readable_on_host(tensor: Tensor) -> bool:
    """Whether reading values costs no wait for a device and breaks no graph that is being compiled."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
