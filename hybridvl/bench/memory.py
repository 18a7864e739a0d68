"""Peak memory of a piece of work: the process's resident set on a CPU, PyTorch's allocator on a GPU."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from hybridvl.bench.sides import Results, result_bytes
from hybridvl.resident import high_water_bytes, resident_bytes

_RESET = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Peak:
    """Memory of one run.

    Attributes:
        peak: bytes by which the memory in use rose at most.
        scratch: of these, what was not the memory of the results.
    """

    peak: int
    scratch: int


def peak_memory(run: Callable[[], Results], device: str) -> Peak | None:
    """Memory of one run that has run before (its caches are filled); None where the system does not tell.

    On a CPU freed memory is first given back to the system and the kernel's high-water mark of the resident set is
    reset; what the run adds is then all that was touched at once, freed blocks included only if they were used.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        return _cuda_peak(run, device)
    before = settled_bytes()
    if before is None or not _reset_high_water_mark():
        return None
    kept = run()
    high = high_water_bytes()
    if high is None:
        return None
    peak = max(0, high - before)
    return Peak(peak, max(0, peak - result_bytes(kept)))


def settled_bytes() -> int | None:
    """The process's resident set in bytes, after freed memory was given back; None where that cannot be had."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is None:
        return None
    trim(0)
    return resident_bytes()


def _cuda_peak(run: Callable[[], Results], device: str) -> Peak:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kept = run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    return Peak(peak, max(0, peak - result_bytes(kept)))


def _reset_high_water_mark() -> bool:
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True
