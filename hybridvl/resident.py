"""The main memory that this process holds, as Linux counts it."""

from __future__ import annotations

import re
from pathlib import Path

_STATUS = Path("/proc/self/status")


def resident_bytes() -> int | None:
    """The process's resident set in bytes; None where the system does not tell."""
    return _told("VmRSS")


def high_water_bytes() -> int | None:
    """The largest resident set, in bytes, since the process began or the mark was last reset (proc(5), clear_refs)."""
    return _told("VmHWM")


def _told(name: str) -> int | None:
    found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE) if _STATUS.exists() else None
    return None if found is None else int(found[1]) * 1024
