"""Scanned digits as frames and pages: scans of wanted digits, and frames with a text before them or without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybridvl.data.digits import scan_splits, scans
from hybridvl.data.scans import INK, PAPER, render_page
from hybridvl.data.task import Split

MOST_DISTORTED = 2
"""Largest `augment` of a probe."""


def frame_parts(
    numbers: NDArray[np.int64],
    labels: Sequence[str],
    size: int,
    augment: float,
    rng: np.random.Generator,
    negative: Sequence[int] = (),
) -> list[dict[str, Any]]:
    """The parts of a message that shows scans as frames, each after its label.

    numbers: (frames,) the scans. labels: of each, "" for none. size: pixels a side. negative: frames that are shown
    with light ink on dark paper.
    """
    strip = render_page(scans()[0], numbers[:, None], size, augment, rng)
    frames = np.split(strip, len(labels))
    for place in negative:
        frames[place] = np.clip(PAPER + INK - frames[place], 0, 255).astype(np.uint8)
    parts: list[dict[str, Any]] = []
    for frame, label in zip(frames, labels, strict=True):
        parts += [{"type": "text", "text": label}] if label else []
        parts.append({"type": "image", "image": frame})
    return parts


def scans_of(digits: NDArray[np.int64], split: Split, rng: np.random.Generator) -> NDArray[np.int64]:
    """A random scan of the split for each of the digits, in their shape."""
    own = scan_splits()[split]
    own = own[np.argsort(scans()[1][own], kind="stable")]
    ends = np.cumsum(np.bincount(scans()[1][own], minlength=10))
    starts = np.concatenate([[0], ends[:-1]])
    return own[rng.integers(starts[digits], ends[digits])]
