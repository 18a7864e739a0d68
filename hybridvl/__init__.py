"""Hybrid-attention ablations on vision-language models; public names are imported when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from hybridvl.hf import auto as _auto

if TYPE_CHECKING:
    from hybridvl.checkpoints import load, save
    from hybridvl.layers.errors import ConfigError

__version__ = "0.1.0"

__all__ = ["ConfigError", "__version__", "load", "save"]

# Where each public name lives. Importing them here would import torch, which takes seconds.
_HOMES = {
    "ConfigError": "hybridvl.layers.errors",
    "load": "hybridvl.checkpoints",
    "save": "hybridvl.checkpoints",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use and keep it, so that later uses are plain attribute reads."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Imports nothing heavy: waits until transformers' auto classes are imported, to make our folders known to them.
_auto.install()
