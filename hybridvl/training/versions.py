"""Versions of what a result depends on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

REQUIRED = ("hybridvl", "torch", "lightning", "jsonargparse", "omegaconf", "transformers", "datasets", "numpy")
KERNELS = ("triton", "flash-linear-attention", "fla-core", "flash-attn", "causal-conv1d", "mamba-ssm")


def versions() -> dict[str, str]:
    """Python's version and those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in (*REQUIRED, *KERNELS):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
