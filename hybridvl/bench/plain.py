"""transformers' own PyTorch functions, also where fla or mamba-ssm is installed and would be called instead."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from hybridvl.bench.sides import Results
from hybridvl.layers.errors import ConfigError

_FUNCTIONS = (
    *("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule", "causal_conv1d_fn", "causal_conv1d_update"),
    *("mamba2_chunk_scan", "mamba2_selective_state_update", "mamba2_split_conv1d_scan_combined"),
)


def modeling(name: str) -> ModuleType:
    """transformers' module of a model type; ConfigError where the installed version lacks it."""
    try:
        return importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    except ImportError as error:
        raise ConfigError(f"peer transformers: it has no model type {name!r} here ({error})") from error


def plain_function(module: ModuleType, name: str) -> Callable[..., Any]:
    """The PyTorch form of one of its functions."""
    found = getattr(module, name, None)
    if found is None:
        raise ConfigError(f"peer transformers: {module.__name__} has no {name} in the installed version")
    function: Callable[..., Any] = inspect.unwrap(found)
    return function


@contextlib.contextmanager
def plain_functions(module: ModuleType, device: str) -> Iterator[None]:
    """Within it the module's models call PyTorch on a CPU, whatever kernels are installed; on a GPU nothing changes."""
    names = [name for name in _FUNCTIONS if hasattr(module, name)] if device == "cpu" else []
    before = {name: getattr(module, name) for name in names}
    for name, function in before.items():
        setattr(module, name, inspect.unwrap(function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(module, name, function)


def plainly(module: ModuleType, device: str, run: Callable[[], Results]) -> Callable[[], Results]:
    """`run` within `plain_functions`."""

    def wrapped() -> Results:
        with plain_functions(module, device):
            return run()

    return wrapped
