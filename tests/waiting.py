"""Waiting for what another thread, a process or a page is to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def wait_until(condition: Callable[[], Any], seconds: float = 90, pause: float = 0.005) -> Any:
    """What the condition gives once that is neither False nor None; 0 is something, too."""
    end = time.monotonic() + seconds
    while (found := condition()) is None or found is False:
        assert time.monotonic() < end
        time.sleep(pause)
    return found
