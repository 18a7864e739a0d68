"""Page order: pages are shown; where one came, which of two came first, and what stood on the first is asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hybridvl.data.digits import scans
from hybridvl.data.probes.frames import MOST_DISTORTED, scans_of
from hybridvl.data.probes.probe import Asked, Probe
from hybridvl.data.probes.sizes import bucket, load_prefix, require_number
from hybridvl.data.probes.symbols import digits_text
from hybridvl.data.scans import render_page
from hybridvl.data.task import Split, kind_weights, require_span
from hybridvl.layers.errors import ConfigError

DEFAULT_KINDS = {"place": 1.0, "order": 1.0, "first": 1.0}
"""Question kinds and how often each is asked."""

_MOST_DIGITS = 4


class Pages(NamedTuple):
    """Pages and questions about them.

    scans: (pages, digits), which scans stand on each. asked: of each question its kind, the page that it is about and,
    for "order", the other page, each from 0.
    """

    scans: NDArray[np.int64]
    asked: list[tuple[str, int, int]]


class PageOrder(Probe[Pages]):
    """Pages, each with a number in scanned digits, no two with the same, and questions about their order.

    - "place": "On which page was 7?", the pages counted from 1; one of n by guessing.
    - "order": "Which came first, 7 or 2?"; one of two by guessing.
    - "first": "What was on the first page?"; 1 of 10 ** digits by guessing.

    Distance is how many pages ago the page came, 1 for the last one, and for "order" how many pages the two are apart;
    each is as likely as any other in the first question about a sample. Kinds are "place_lag_3_4", "order_apart_2",
    "first_lag_5_8" and so on; with a range of pages they begin with "pages_5_8_". No scan is in two splits.

    Guessing is that of one who has not seen the pages. An answer may help to find a later one of the same conversation,
    and a page that is remembered to find where others were: the last one did not come first.

    Args:
        pages: fewest and most pages, at least 2, or how many each sample has.
        digits: digits of the number on a page.
        cell: pixels per side of a digit's cell; a page is a line of them.
        turns: questions about one training sample, in one conversation.
        eval_turns: the same for validation and test samples.
        kinds: question kinds and their weights.
        augment: strength of the distortion of training digits; 0 turns it off, 1 is as strong as it stays legible.
        train_samples: training samples in an epoch.
        val_samples: validation samples.
        test_samples: test samples.
    """

    def __init__(
        self,
        pages: int | tuple[int, int] = 4,
        digits: int = 1,
        cell: int = 8,
        turns: int = 4,
        eval_turns: int = 1,
        kinds: Mapping[str, float] | None = None,
        augment: float = 0.5,
        train_samples: int = 16_000,
        val_samples: int = 256,
        test_samples: int = 1_000,
    ) -> None:
        sizes = {"digits": digits, "cell": cell, "turns": turns, "eval_turns": eval_turns}
        super().__init__((train_samples, val_samples, test_samples), "samples", sizes)
        if digits > _MOST_DIGITS:
            raise ConfigError(f"data.task.digits: {digits}; expected at most {_MOST_DIGITS}")
        self.pages = require_span("data.task.pages", pages, 10**digits)
        if self.pages[0] < 2:
            raise ConfigError(
                f"data.task.pages: {pages if isinstance(pages, int) else list(self.pages)}; expected at least 2"
            )
        self.kinds = kind_weights(DEFAULT_KINDS if kinds is None else kinds, DEFAULT_KINDS)
        require_number("augment", augment, MOST_DISTORTED)
        self.digits = digits
        self.cell = cell
        self.turns = turns
        self.eval_turns = eval_turns
        self.augment = augment

    def draw(self, rng: np.random.Generator, split: Split) -> Pages:
        """Pages and what is asked about them."""
        count = int(rng.integers(self.pages[0], self.pages[1] + 1))
        numbers = rng.choice(10**self.digits, count, replace=False)
        digits = numbers[:, None] // 10 ** np.arange(self.digits)[::-1] % 10
        turns = self.turns if split == "train" else self.eval_turns
        weights = np.array(list(self.kinds.values()))
        asked: dict[tuple[str, int, int], None] = {}
        for kind in rng.choice(list(self.kinds), 4 * turns, p=weights / weights.sum()).tolist():
            asked.setdefault(_draw_question(kind, count, rng))
            if len(asked) == turns:
                break
        return Pages(scans_of(digits, split, rng), list(asked))

    def show(self, drawn: Pages, rng: np.random.Generator, split: Split) -> list[dict[str, Any]]:
        """The pages."""
        augment = self.augment if split == "train" else 0.0
        sheet = render_page(scans()[0], drawn.scans, self.cell, augment, rng)
        return [{"type": "image", "image": page} for page in np.split(sheet, len(drawn.scans))]

    def ask(self, drawn: Pages) -> list[Asked]:
        """The questions."""
        return [self._asked(drawn, *question) for question in drawn.asked]

    def _asked(self, drawn: Pages, kind: str, page: int, other: int) -> Asked:
        count = len(drawn.scans)
        prefix = f"{load_prefix('pages', count, self.pages)}{kind}"
        powers = 10 ** np.arange(self.digits)[::-1]
        names = [digits_text(number, self.digits) for number in (scans()[1][drawn.scans] @ powers).tolist()]
        if kind == "order":
            question = f"Which came first, {names[page]} or {names[other]}?"
            return Asked(question, names[min(page, other)], f"{prefix}_apart_{bucket(abs(page - other))}", 0.5)
        kind_and_lag = f"{prefix}_lag_{bucket(count - page)}"
        if kind == "place":
            return Asked(f"On which page was {names[page]}?", str(page + 1), kind_and_lag, 1 / count)
        return Asked("What was on the first page?", names[0], kind_and_lag, 0.1**self.digits)


def _draw_question(kind: str, pages: int, rng: np.random.Generator) -> tuple[str, int, int]:
    """A question of a kind; of order, every distance is as likely, and either page is named first."""
    if kind == "order":
        apart = int(rng.integers(1, pages))
        early = int(rng.integers(pages - apart))
        return (kind, early, early + apart) if rng.random() < 0.5 else (kind, early + apart, early)
    page = int(rng.integers(pages)) if kind == "place" else 0
    return kind, page, page
