"""Streams of scanned digits as frames, with or without a text before each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybridvl.data.digits import scans
from hybridvl.data.scans import render_page


def frame_parts(
    numbers: NDArray[np.int64], labels: Sequence[str], size: int, augment: float, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """The parts of a message that shows the scans `numbers` (frames,), `size` pixels a side, each after its label."""
    strip = render_page(scans()[0], numbers[:, None], size, augment, rng)
    parts: list[dict[str, Any]] = []
    for frame, label in zip(np.split(strip, len(labels)), labels, strict=True):
        parts += [{"type": "text", "text": label}] if label else []
        parts.append({"type": "image", "image": frame})
    return parts
