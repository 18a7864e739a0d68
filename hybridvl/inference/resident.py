"""The memory that this process holds, as the system counts it."""

from __future__ import annotations

import resource
from pathlib import Path

_PAGES = Path("/proc/self/statm")


def resident_bytes() -> int | None:
    """The process's resident set in bytes; None where the system does not tell."""
    return int(_PAGES.read_text().split()[1]) * resource.getpagesize() if _PAGES.exists() else None
