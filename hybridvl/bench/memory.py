"""Peak memory of a piece of work: the process's resident set on a CPU, PyTorch's allocator on a GPU."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from hybridvl.bench.sides import Results, result_bytes

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


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
    if not (_RESET.exists() and _give_back()):
        return None
    try:
        _RESET.write_text("5")
    except OSError:
        return None
    before = _status("VmRSS")
    kept = run()
    peak = max(0, _status("VmHWM") - before)
    return Peak(peak, max(0, peak - result_bytes(kept)))


def resident_bytes() -> int:
    """The process's resident set, after freed memory was given back to the system."""
    _give_back()
    return _status("VmRSS")


def _cuda_peak(run: Callable[[], Results], device: str) -> Peak:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kept = run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    return Peak(peak, max(0, peak - result_bytes(kept)))


def _give_back() -> bool:
    """Return the heap's free pages to the system, so that reusing them shows; False without glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return False
    trim(0)
    return True


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{_STATUS} has no {name}")
    return int(found[1]) * 1024
