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

# Looked up once, so that `resolve_backend` is plain Python that torch.compile can trace. (Marking it constant for the
# compiler would import torch._dynamo, and with it Triton where that is installed.)
_INSTALLED = frozenset(name for name in ("triton", "fla", "flash_attn") if importlib.util.find_spec(name) is not None)
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")


class _Workload(NamedTuple):
    """What decides whether an implementation can run, and whether it is the best; see `resolve_backend`."""

    device: torch.device
    dtype: torch.dtype
    key_dim: int = 0
    value_dim: int = 0
    tokens: int = 0
    grad: bool = False
    packed: bool = False
    windowed: bool = False
    masked: bool = False


def _always(work: _Workload) -> bool:
    return True


def _on_cuda(work: _Workload) -> bool:
    return work.device.type == "cuda"


def _by_itself(work: _Workload) -> bool:
    """On CUDA, unless a compiler makes one kernel of it and of what is around it."""
    return _on_cuda(work) and not torch.compiler.is_compiling()


def _long_bands(work: _Workload) -> bool:
    """Where FlexAttention's skipped blocks are worth its compilation."""
    return (work.windowed or work.packed) and work.tokens >= 1024


def _plain(work: _Workload) -> bool:
    """Where one fused call does no masked work: elsewhere its dense mask takes O(T^2) time and memory."""
    return _on_cuda(work) and not (work.windowed or work.packed)


_HALF = (torch.bfloat16, torch.float16)
_NARROW = (*_HALF, torch.float32)


@dataclass(frozen=True)
class _Backend:
    """An implementation of an operator by name, what it needs, and for what `auto` takes it."""

    name: str
    packages: tuple[str, ...] = ()
    cuda: bool = False
    dtypes: tuple[torch.dtype, ...] = ()  # () = all
    max_dim: int = 0  # of keys and values, 0 = any
    equal_dims: bool = False  # values as wide as keys
    grad: bool = True  # gradients can be recorded
    packed: bool = True  # takes packed segments
    masks: bool = True  # takes masks of the keys
    best: Callable[[_Workload], bool] = _always

    def unusable(self, work: _Workload) -> str | None:
        """Why it cannot run a workload; None when it can."""
        dim = max(work.key_dim, work.value_dim)
        kernels = "its Triton kernels" if "triton" in self.packages else "its kernels"
        interpreted = self.name == "triton" and _INTERPRETED and work.device.type == "cpu"
        if self.cuda and work.device.type != "cuda" and not interpreted:
            return f"{kernels} need CUDA tensors, these are on {work.device.type!r}"
        if self.dtypes and work.dtype not in self.dtypes:
            return f"{kernels} take {_words(self.dtypes)}, not {work.dtype}"
        if self.max_dim and dim > self.max_dim:
            return f"{kernels} take key and value dims up to {self.max_dim}, not {dim}"
        if self.equal_dims and work.value_dim not in (0, work.key_dim):
            return f"{kernels} take values as wide as keys, not {work.value_dim} beside {work.key_dim}"
        if work.grad and not self.grad:
            return f"{kernels} have no backward pass, and gradients are recorded"
        if work.packed and not self.packed:
            return f"{kernels} take no packed segments"
        if work.masked and not self.masks:
            return f"{kernels} take no mask of the keys"
        missing = [name for name in self.packages if name not in _INSTALLED]
        return f"{' and '.join(missing)} not installed" if missing else None


@dataclass(frozen=True)
class BackendChoice:
    """One row of `backends_report`: an operator's backend, whether and why it is usable, whether `auto` takes it."""

    op: str
    backend: str
    usable: bool
    reason: str
    chosen: bool


_REFERENCE, _TORCH = _Backend("reference"), _Backend("torch")
_FLA = _Backend("fla", ("triton", "fla"), cuda=True, dtypes=_HALF, max_dim=256)
_FLASH = _Backend("flash_attn", ("flash_attn",), cuda=True, dtypes=_HALF, max_dim=256, equal_dims=True, masks=False)
_FLEX = _Backend("flex", ("triton",), cuda=True, dtypes=_NARROW, max_dim=256, masks=False, best=_long_bands)
_SDPA = _Backend("sdpa", best=_plain)
_NORM = _Backend("triton", ("triton",), cuda=True, dtypes=_NARROW, max_dim=16384, best=_on_cuda)
_STEP = _Backend("triton", ("triton",), cuda=True, dtypes=_NARROW, max_dim=256, grad=False, best=_on_cuda)
_CONV = _Backend("triton", ("triton",), cuda=True, dtypes=_NARROW, grad=False, packed=False, best=_by_itself)
_ROTARY = _Backend("triton", ("triton",), cuda=True, dtypes=_NARROW, max_dim=256, best=_by_itself)
_GATE = _Backend("triton", ("triton",), cuda=True, dtypes=_NARROW, grad=False, best=_by_itself)
_PLAIN_NORM = _Backend("triton", ("triton",), cuda=True, dtypes=_NARROW, max_dim=16384, best=_by_itself)
_STORE = _Backend("triton", ("triton",), cuda=True, dtypes=_NARROW, max_dim=256, grad=False, best=_by_itself)

# In the order in which `auto` tries them; the reference comes last.
_BACKENDS: dict[str, tuple[_Backend, ...]] = {
    "gated_delta_rule": (_FLA, _TORCH, _REFERENCE),
    "ssd": (_FLA, _TORCH, _REFERENCE),
    "causal_conv": (_CONV, _TORCH, _REFERENCE),
    "attention": (_FLASH, _FLEX, _SDPA, _TORCH, _REFERENCE),
    "rotary": (_ROTARY, _TORCH, _REFERENCE),
    "ring_attention": (_STEP, _TORCH, _REFERENCE),
    "store_in_slots": (_STORE, _TORCH, _REFERENCE),
    "gated_delta_net_step": (_STEP, _TORCH, _REFERENCE),
    "mamba2_step": (_STEP, _TORCH, _REFERENCE),
    "swiglu": (_GATE, _TORCH, _REFERENCE),
    "rms_norm": (_PLAIN_NORM, _TORCH, _REFERENCE),
    "gated_rms_norm": (_NORM, _TORCH, _REFERENCE),
}


def resolve_backend(
    op: str,
    requested: str,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    key_dim: int = 0,
    value_dim: int = 0,
    tokens: int = 0,
    grad: bool = False,
    packed: bool = False,
    windowed: bool = False,
    masked: bool = False,
) -> str:
    """The name of the backend that operator `op` uses for tensors of a device and a dtype.

    key_dim, value_dim: K and V per head (of a norm: the width of a group), 0 = does not matter. tokens: T. grad:
    gradients are recorded. packed, windowed, masked: cu_seqlens, a window, a mask of the keys are given.
    `requested` other than "auto" decides; else the environment variable HYBRIDVL_BACKEND, either one name for every
    operator that has it ("reference") or a list ("ssd=reference,attention=torch"); else the first that is usable and
    best for such tensors.
    Raises ConfigError, saying why, when the explicit choice is unknown or unusable.
    """
    if requested == "auto" and device.type == "cpu" and ENVIRONMENT not in os.environ:
        return "torch"  # as the search below would find, but at once: small layers ask often
    work = _Workload(device, dtype, key_dim, value_dim, tokens, grad, packed, windowed, masked)
    if requested != "auto":
        return _explicit(op, requested, work, f"{op}: backend")
    named = _from_environment().get(op, "auto")
    # One name for all operators holds for those that can: a kernel without a backward pass is no obstacle to training.
    if named != "auto" and ("=" in os.environ[ENVIRONMENT] or _takes(op, named, grad, packed)):
        return _explicit(op, named, work, f"{ENVIRONMENT}: {op}")
    return next(backend.name for backend in _BACKENDS[op] if backend.best(work) and backend.unusable(work) is None)


def backend_names(*ops: str) -> tuple[str, ...]:
    """What the `backend` argument of an operator accepts; of several, what at least one of them does."""
    return ("auto", *sorted({backend.name for op in ops for backend in _BACKENDS[op]}))


def backend_or_auto(op: str, name: str) -> str:
    """A mixer's choice as the `backend` of one of its operators: "auto" when that operator has no such backend."""
    return name if name in backend_names(op) else "auto"


def usable_or_auto(
    op: str, name: str, device: torch.device, dtype: torch.dtype, grad: bool = False, packed: bool = False
) -> str:
    """The same for an operator that a mixer's choice is not mainly meant for: "auto" also where it cannot run."""
    work = _Workload(device, dtype, grad=grad, packed=packed)
    usable = name != "auto" and any(b.name == name and b.unusable(work) is None for b in _BACKENDS[op])
    return name if usable else "auto"


def backends_report(device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16) -> list[BackendChoice]:
    """Every operator's backends as they stand for tensors of a dtype on `device`, without gradients or masks."""
    work = _Workload(torch.device(device), dtype)
    rows = []
    for op, backends in _BACKENDS.items():
        chosen = resolve_backend(op, "auto", work.device, dtype)
        for backend in backends:
            reason = backend.unusable(work)
            rows.append(BackendChoice(op, backend.name, reason is None, reason or "", backend.name == chosen))
    return rows


def _takes(op: str, name: str, grad: bool, packed: bool) -> bool:
    return any(b.name == name and b.grad >= grad and b.packed >= packed for b in _BACKENDS[op])


def _words(dtypes: tuple[torch.dtype, ...]) -> str:
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return f"{', '.join(names[:-1])} and {names[-1]}"


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
