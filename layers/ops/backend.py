"""Which implementation of an operator runs: the one place where backends are listed, checked and chosen."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from hybridvl.layers.errors import ConfigError

ENVIRONMENT = "HYBRIDVL_BACKEND"
_FLA_MAX_KEY_DIM = 256

# Looked up once, so that `resolve_backend` is plain Python that torch.compile can trace. (Marking it constant for the
# compiler would import torch._dynamo, and with it Triton where that is installed.)
_INSTALLED = frozenset(name for name in ("triton", "fla") if importlib.util.find_spec(name) is not None)


class _Workload(NamedTuple):
    """What decides whether an implementation can run."""

    device: torch.device
    dtype: torch.dtype
    key_dim: int


@dataclass(frozen=True)
class _Backend:
    """An implementation of an operator by name, and why it cannot run a workload (None when it can)."""

    name: str
    unusable: Callable[[_Workload], str | None]


@dataclass(frozen=True)
class BackendChoice:
    """One row of `backends_report`: an operator's backend, whether and why it is usable, whether `auto` takes it."""

    op: str
    backend: str
    usable: bool
    reason: str
    chosen: bool


def _always(work: _Workload) -> str | None:
    return None


def _needs_fla(work: _Workload) -> str | None:
    if work.device.type != "cuda":
        return f"its Triton kernels need CUDA tensors, these are on {work.device.type!r}"
    if work.dtype not in (torch.bfloat16, torch.float16):
        return f"its kernels take bfloat16 and float16, not {work.dtype}"
    if work.key_dim > _FLA_MAX_KEY_DIM:
        return f"its kernels take key dims up to {_FLA_MAX_KEY_DIM}, not {work.key_dim}"
    missing = [name for name in ("triton", "fla") if name not in _INSTALLED]
    if missing:
        return f"{' and '.join(missing)} not installed"
    return None


_REFERENCE, _TORCH, _FLA = _Backend("reference", _always), _Backend("torch", _always), _Backend("fla", _needs_fla)

# In the order in which `auto` tries them; the reference comes last.
_BACKENDS: dict[str, tuple[_Backend, ...]] = {
    "gated_delta_rule": (_FLA, _TORCH, _REFERENCE),
    "ssd": (_TORCH, _REFERENCE),
    "causal_conv": (_TORCH, _REFERENCE),
    "attention": (_TORCH, _REFERENCE),
}


def resolve_backend(
    op: str, requested: str, device: torch.device, dtype: torch.dtype = torch.bfloat16, key_dim: int = 0
) -> str:
    """The name of the backend that operator `op` uses for tensors of a device, a dtype and a key dim K.

    `requested` other than "auto" decides; else the environment variable HYBRIDVL_BACKEND, either one name for every
    operator that has it ("reference") or a list ("ssd=reference,attention=torch"); else the first usable one.
    Raises ConfigError, saying why, when the explicit choice is unknown or unusable.
    """
    work = _Workload(device, dtype, key_dim)
    if requested != "auto":
        return _explicit(op, requested, work, f"{op}: backend")
    named = _from_environment().get(op, "auto")
    if named != "auto":
        return _explicit(op, named, work, f"{ENVIRONMENT}: {op}")
    return next(backend.name for backend in _BACKENDS[op] if backend.unusable(work) is None)


def backend_names(op: str) -> tuple[str, ...]:
    """What the `backend` argument of operator `op` accepts."""
    return ("auto", *sorted(backend.name for backend in _BACKENDS[op]))


def backends_report(device: torch.device | str = "cpu") -> list[BackendChoice]:
    """Every operator's backends as they stand for bfloat16 tensors on `device`."""
    device = torch.device(device)
    work = _Workload(device, torch.bfloat16, 0)
    rows = []
    for op, backends in _BACKENDS.items():
        chosen = resolve_backend(op, "auto", device)
        for backend in backends:
            reason = backend.unusable(work)
            rows.append(BackendChoice(op, backend.name, reason is None, reason or "", backend.name == chosen))
    return rows


def _explicit(op: str, name: str, work: _Workload, place: str) -> str:
    known = {backend.name: backend for backend in _BACKENDS[op]}
    if name not in known:
        raise ConfigError(f"{place} {name!r} is unknown; accepted: auto, {', '.join(sorted(known))}")
    reason = known[name].unusable(work)
    if reason is not None:
        raise ConfigError(f"{place} {name!r} cannot be used: {reason}")
    return name


def _from_environment() -> dict[str, str]:
    text = os.environ.get(ENVIRONMENT, "").strip()
    if not text:
        return {}
    if "=" not in text:
        return _everywhere(text)
    choices: dict[str, str] = {}
    for item in text.split(","):
        op, separator, name = (part.strip() for part in item.partition("="))
        if not separator or op not in _BACKENDS or not name:
            raise ConfigError(
                f"{ENVIRONMENT}={text!r}: {item.strip()!r} is not OPERATOR=BACKEND; operators: {', '.join(_BACKENDS)}"
            )
        choices[op] = name
    return choices


def _everywhere(name: str) -> dict[str, str]:
    """One name for all operators; those that do not have it choose for themselves."""
    choices = {op: name for op, backends in _BACKENDS.items() if name in {backend.name for backend in backends}}
    if not choices and name != "auto":
        known = sorted({backend.name for backends in _BACKENDS.values() for backend in backends})
        raise ConfigError(
            f"{ENVIRONMENT}={name!r} is unknown; accepted: auto, {', '.join(known)}, or OPERATOR=BACKEND,..."
        )
    return choices
