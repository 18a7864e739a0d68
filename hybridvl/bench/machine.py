"""What the machine can do, measured in the same run as the work, and what it is."""

from __future__ import annotations

import datetime
import os
import platform
import re
import statistics
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridvl.bench.timing import Timer, timer
from hybridvl.layers.errors import ConfigError

_PACKAGES = ("hybridvl", "torch", "transformers", "flash-linear-attention", "fla-core", "flash-attn", "triton")
_COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
_SIZE = re.compile(r"(\d+)([KM])")
_MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Limits:
    """Best of several measurements each.

    Attributes:
        matmul_flops: FLOP/s of a large square matrix product in the dtype.
        copy_bytes: bytes/s read and written by a copy much larger than the caches.
        inplace_bytes: bytes/s read and written by a multiplication in place.
    """

    matmul_flops: float
    copy_bytes: float
    inplace_bytes: float

    @property
    def bytes(self) -> float:
        """The better of the two."""
        return max(self.copy_bytes, self.inplace_bytes)


def measure_limits(dtype: torch.dtype, device: str, measure: Timer | None = None, repeats: int = 5) -> Limits:
    """Measure the limits of a device with the threads that torch has."""
    measure = measure or timer(device)
    kind = torch.device(device).type
    size, count = _MATMUL_SIZE.get(kind, 1024), _COPY_BYTES.get(kind, 256 << 20) // 4
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    source, target = torch.ones(count, device=device), torch.empty(count, device=device)

    def product() -> dict[str, Tensor]:
        return {"out": torch.mm(a, b, out=out)}

    def copy() -> dict[str, Tensor]:
        return {"out": target.copy_(source)}

    def scale() -> dict[str, Tensor]:
        return {"out": source.mul_(1.0)}

    best = []
    for run in (product, copy, scale):
        measure(run, 1)
        best.append(min(measure(run, 1) for _ in range(repeats)))
    return Limits(2 * size**3 / best[0], 2 * source.nbytes / best[1], 2 * source.nbytes / best[2])


def usable_device(name: str) -> str:
    """The name of a CPU or a CUDA device that is there; else ConfigError."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name!r}: expected cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: there is no CUDA device; expected cpu")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: expected cpu, cuda or cuda:N")
    return name


def describe(device: str) -> dict[str, Any]:
    """Hardware, threads, versions and date, for committed results."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device,
        "versions": {"python": platform.python_version(), **_versions()},
    }
    if torch.device(device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found


def usable_cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_size(device: str) -> int:
    """Bytes of the largest cache; 32 MiB where the system does not tell."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    known = [int(found[1]) << {"K": 10, "M": 20}[found[2]] for size in sizes if (found := _SIZE.fullmatch(size))]
    return max(known, default=32 << 20)


def overhead(repeats: int = 5, calls: int = 2000) -> float:
    """Seconds of a small operation on one element."""
    x, measure = torch.ones(1), timer("cpu")

    def run() -> dict[str, Tensor]:
        for _ in range(calls):
            x.add(1.0)
        return {}

    return statistics.median(measure(run, 1) for _ in range(repeats)) / calls


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
