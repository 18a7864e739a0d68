"""Visual needle: one frame of a long stream that stands out, by its look or by a mark before it, is asked for."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hybridvl.data.digits import scan_splits, scans
from hybridvl.data.probes.frames import MOST_DISTORTED, frame_parts
from hybridvl.data.probes.probe import Asked, Probe
from hybridvl.data.probes.sizes import bucket, load_prefix, require_lag, require_number
from hybridvl.data.probes.symbols import LONGEST_STREAM
from hybridvl.data.task import Split, require_span
from hybridvl.layers.errors import ConfigError

_MARK = "*"
_QUESTIONS = {"odd": "Which digit was white?", "labelled": "Which digit was marked?"}


class Haystack(NamedTuple):
    """scans: (frames,) which scan each frame shows; needle: the frame that stands out."""

    scans: NDArray[np.int64]
    needle: int


class VisualNeedle(Probe[Haystack]):
    """Long streams of scanned digits as frames, one of which stands out; which digit was it?

    An odd frame is a negative, light ink on dark paper, and can be told from its look alone; a labelled one has a mark,
    "*", in the text before it. The lag of the question is how many frames ago the needle came, 1 for the last one, and
    every lag is as likely as any other. Kinds are "lag_33_64" and so on; with a range of frames they begin with
    "frames_65_128_", by the length of the stream. Guessing is right one time in ten. No scan is in two splits.

    Args:
        frames: fewest and most frames of a stream, or how many each has.
        needle: "odd" or "labelled".
        lag: smallest and largest lag; null: any.
        size: pixels per side of a frame.
        augment: strength of the distortion of training digits; 0 turns it off, 1 is as strong as it stays legible.
        train_samples: training streams in an epoch.
        val_samples: validation streams.
        test_samples: test streams.
    """

    def __init__(
        self,
        frames: int | tuple[int, int] = (16, 128),
        needle: Literal["odd", "labelled"] = "odd",
        lag: tuple[int, int] | None = None,
        size: int = 8,
        augment: float = 0.5,
        train_samples: int = 16_000,
        val_samples: int = 256,
        test_samples: int = 1_000,
    ) -> None:
        super().__init__((train_samples, val_samples, test_samples), "samples", {"size": size})
        self.frames = require_span("data.task.frames", frames, LONGEST_STREAM)
        self.lag = require_lag(lag, self.frames[0], LONGEST_STREAM)
        if needle not in _QUESTIONS:
            raise ConfigError(f"data.task.needle: {needle!r}; expected one of {', '.join(_QUESTIONS)}")
        require_number("augment", augment, MOST_DISTORTED)
        self.needle = needle
        self.size = size
        self.augment = augment

    def draw(self, rng: np.random.Generator, split: Split) -> Haystack:
        """The frames of a stream and its needle."""
        count = int(rng.integers(self.frames[0], self.frames[1] + 1))
        nearest, farthest = self.lag or (1, count)
        lag = int(rng.integers(nearest, min(farthest, count) + 1))
        return Haystack(rng.choice(scan_splits()[split], size=count), count - lag)

    def show(self, drawn: Haystack, rng: np.random.Generator, split: Split) -> list[dict[str, Any]]:
        """The frames."""
        odd = self.needle == "odd"
        labels = ["" if odd or place != drawn.needle else _MARK for place in range(len(drawn.scans))]
        augment = self.augment if split == "train" else 0.0
        return frame_parts(drawn.scans, labels, self.size, augment, rng, [drawn.needle] if odd else [])

    def ask(self, drawn: Haystack) -> list[Asked]:
        """Which digit the needle was."""
        count = len(drawn.scans)
        kind = f"{load_prefix('frames', count, self.frames)}lag_{bucket(count - drawn.needle)}"
        return [Asked(_QUESTIONS[self.needle], str(scans()[1][drawn.scans[drawn.needle]]), kind, 0.1)]
