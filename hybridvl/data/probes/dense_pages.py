"""Dense pages: pages with ever more scanned digits, read out whole."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybridvl.data.digits import scan_splits, scans
from hybridvl.data.probes.frames import MOST_DISTORTED
from hybridvl.data.probes.probe import Asked, Probe
from hybridvl.data.probes.sizes import bucket, require_number, require_skew, skewed_size
from hybridvl.data.scans import PAPER, render_page
from hybridvl.data.task import Split, require_span
from hybridvl.layers.errors import ConfigError

_MOST_DIGITS = 10_000
_SMALLEST_CELL = 4


class DensePages(Probe[NDArray[np.int64]]):
    """Pages of n scanned digits with the one question "Read the page.": how many can be read before reading fails?

    The digits stand in as many columns as lines, or nearly so: ceil(sqrt(n)) columns, of which the last line may fill
    some; the answer is the lines. In evaluation every n is as likely as any other. Kinds are "digits_5_8" and so on.
    Guessing n digits is right 10 ** -n of the times; part of a page that is right shows in the accuracy of tokens.

    With `cell`, pages grow with their digits, and so do the tokens that they are read from. With `page`, all pages are
    of one size, and the digits shrink. No scan is in two splits.

    Args:
        digits: fewest and most digits of a page, or how many each has.
        cell: pixels per side of a digit's cell.
        page: pixels per side of a page, instead of `cell`; null: as many as its cells need.
        separator: what stands between the digits of a line in an answer.
        skew: how much more often training shows small pages, from which reading is learnt first: n digits have a weight
            of n ** -skew; at 0 every n is as likely.
        augment: strength of the distortion of training digits; 0 turns it off, 1 is as strong as it stays legible.
        train_samples: training pages in an epoch.
        val_samples: validation pages.
        test_samples: test pages.
    """

    def __init__(
        self,
        digits: int | tuple[int, int] = (1, 16),
        cell: int = 8,
        page: int | None = None,
        separator: str = "",
        skew: float = 1.0,
        augment: float = 0.5,
        train_samples: int = 16_000,
        val_samples: int = 256,
        test_samples: int = 1_000,
    ) -> None:
        super().__init__((train_samples, val_samples, test_samples), "samples", {"cell": cell})
        self.digits = require_span("data.task.digits", digits, _MOST_DIGITS)
        require_number("augment", augment, MOST_DISTORTED)
        require_skew(skew)
        if page is not None and page < _SMALLEST_CELL * _columns(self.digits[1]):
            raise ConfigError(
                f"data.task.page: {page} pixels; expected at least {_SMALLEST_CELL * _columns(self.digits[1])}, "
                f"{_SMALLEST_CELL} for each of {_columns(self.digits[1])} columns of {self.digits[1]} digits"
            )
        self.cell = cell
        self.page = page
        self.separator = separator
        self.skew = skew
        self.augment = augment

    def draw(self, rng: np.random.Generator, split: Split) -> NDArray[np.int64]:
        """(n,) which scans stand on the page, line by line."""
        count = skewed_size(rng, self.digits, self.skew if split == "train" else 0.0)
        return rng.choice(scan_splits()[split], size=count)

    def show(self, drawn: NDArray[np.int64], rng: np.random.Generator, split: Split) -> list[dict[str, Any]]:
        """The page."""
        columns = _columns(len(drawn))
        # One scan more, of nothing, stands where the last line has no digits.
        pixels = np.concatenate([scans()[0], np.zeros_like(scans()[0][:1])])
        cells = np.full(-(-len(drawn) // columns) * columns, len(pixels) - 1)
        cells[: len(drawn)] = drawn
        side = self.cell if self.page is None else self.page // columns
        image = render_page(pixels, cells.reshape(-1, columns), side, self.augment if split == "train" else 0.0, rng)
        if self.page is not None:
            margins = [(0, self.page - length) for length in image.shape]
            image = np.pad(image, margins, constant_values=int(PAPER))
        return [{"type": "image", "image": image}]

    def ask(self, drawn: NDArray[np.int64]) -> list[Asked]:
        """The digits, line by line."""
        columns = _columns(len(drawn))
        read = list(map(str, scans()[1][drawn].tolist()))
        lines = [self.separator.join(read[start : start + columns]) for start in range(0, len(read), columns)]
        return [Asked("Read the page.", "\n".join(lines), f"digits_{bucket(len(drawn))}", 0.1 ** len(drawn))]


def _columns(digits: int) -> int:
    return math.isqrt(digits - 1) + 1
