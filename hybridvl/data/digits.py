"""The digits task: pages composed of scikit-learn's scanned digits, with questions about what stands on them."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hybridvl.data.scans import render_page
from hybridvl.data.task import Sample, Source, Split, Task, kind_weights, require_span, require_split, sample_rng
from hybridvl.layers.errors import ConfigError

TEST_SCANS = 300
VAL_SCANS = 200

DEFAULT_KINDS = {"line": 4.0, "cell": 2.0, "count": 1.0, "page": 2.0}
"""Question kinds and how often each is asked."""

_SPLIT_SEED = 1797
_MOST_LINES = 99


@cache
def scan_splits() -> dict[Split, NDArray[np.int64]]:
    """The numbers of the scans of each split, which no two splits share; the same whatever the task's seed."""
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(scans()[1]))
    test, val, train = np.split(order, [TEST_SCANS, TEST_SCANS + VAL_SCANS])
    return {"train": train, "val": val, "test": test}


@cache
def scans() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """All 1,797 scans (N, 8, 8) with ink from 0 to 1, and their labels (N,)."""
    found = find_spec("sklearn")
    if found is None or found.origin is None:
        raise ConfigError("data.task: the scanned digits are scikit-learn's, which is not installed")
    # Its file alone, as importing scikit-learn loads pandas and 600 other modules.
    rows = np.loadtxt(Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    return (rows[:, :-1].reshape(-1, 8, 8) / 16).astype(np.float32), rows[:, -1].astype(np.int64)


class DigitPages(Task):
    """Pages of scanned digits in lines and columns, each with questions and answers.

    A page is determined by (seed, split, epoch, number): training pages never repeat, validation and test pages are
    always the same. Test scans never appear on training or validation pages.

    Args:
        rows: fewest and most lines on a page.
        columns: fewest and most digits in a line.
        cell: pixels per side of a digit's cell.
        turns: questions asked about one training page, in one conversation.
        eval_turns: the same for validation and test pages.
        kinds: question kinds and their weights: "line" ("What is on line 2?"), "cell" ("Which digit is at row 3,
            column 1?"), "count" ("How many 7s?"), "page" ("Read the page.").
        separator: what stands between the digits of a line in an answer.
        growth: epochs over which training pages grow from a single digit to full size: so many digits at most, in any
            shape, so that a model finds out on small pages how to go along a line and how to find one among several.
            0 = full size at once.
        augment: strength of the distortion of training digits; 0 turns it off, 1 is as strong as it stays legible.
        train_pages: training pages in an epoch.
        val_pages: validation pages.
        test_pages: test pages.
    """

    def __init__(
        self,
        rows: tuple[int, int] = (2, 4),
        columns: tuple[int, int] = (2, 5),
        cell: int = 16,
        turns: int = 6,
        eval_turns: int = 1,
        kinds: dict[str, float] | None = None,
        separator: str = " ",
        growth: int = 0,
        augment: float = 1.0,
        train_pages: int = 16_000,
        val_pages: int = 256,
        test_pages: int = 1_000,
    ) -> None:
        self.rows = require_span("data.task.rows", rows, _MOST_LINES)
        self.columns = require_span("data.task.columns", columns, _MOST_LINES)
        self.kinds = kind_weights(DEFAULT_KINDS if kinds is None else kinds, DEFAULT_KINDS)
        sizes = {"cell": cell, "turns": turns, "eval_turns": eval_turns}
        self.pages = {"train": train_pages, "val": val_pages, "test": test_pages}
        for name, value in {**sizes, **{f"{split}_pages": count for split, count in self.pages.items()}}.items():
            if value < 1:
                raise ConfigError(f"data.task.{name}: {value}; expected at least 1")
        if growth < 0:
            raise ConfigError(f"data.task.growth: {growth}; expected a number of epochs, at least 0")
        if not 0 <= augment <= 2:
            raise ConfigError(f"data.task.augment: {augment}; expected a number from 0 to 2")
        self.cell = cell
        self.turns = turns
        self.eval_turns = eval_turns
        self.separator = separator
        self.growth = growth
        self.augment = augment

    def source(self, split: Split, seed: int) -> DigitSource:
        """The pages of a split."""
        require_split(split)
        return DigitSource(self, split, seed)


class DigitSource(Source):
    """The pages of one split of a `DigitPages` task."""

    def __init__(self, task: DigitPages, split: Split, seed: int) -> None:
        self.task = task
        self.split = split
        self.seed = seed
        self.training = split == "train"

    def __len__(self) -> int:
        return self.task.pages[self.split]

    def sample(self, index: int, epoch: int) -> Sample:
        """Page `index` with its questions; evaluation pages are the same in every epoch."""
        rng = self._rng(index, epoch)
        numbers = self._scan_numbers(rng, epoch)
        page = render_page(scans()[0], numbers, self.task.cell, self.task.augment if self.training else 0.0, rng)
        labels = scans()[1][numbers]
        messages: list[dict[str, Any]] = []
        kinds = []
        turns = self.task.turns if self.training else self.task.eval_turns
        for number, (kind, question, answer) in enumerate(self._questions(labels, turns, rng)):
            picture = [{"type": "image", "image": Image.fromarray(page)}] if number == 0 else []
            messages.append({"role": "user", "content": [*picture, {"type": "text", "text": question}]})
            messages.append({"role": "assistant", "content": answer})
            kinds.append(kind)
        return {"messages": messages, "kinds": kinds}

    def scan_numbers(self, index: int, epoch: int = 0) -> NDArray[np.int64]:
        """Which scans stand on a page, (lines, columns)."""
        return self._scan_numbers(self._rng(index, epoch), epoch)

    def _rng(self, index: int, epoch: int) -> np.random.Generator:
        return sample_rng(self.seed, self.split, index, epoch)

    def _scan_numbers(self, rng: np.random.Generator, epoch: int) -> NDArray[np.int64]:
        (fewest_rows, most_rows), (fewest_columns, most_columns) = self.task.rows, self.task.columns
        if self.training and epoch < self.task.growth:
            # The first tenth shows single digits.
            done = max(0.0, (epoch / self.task.growth - 0.1) / 0.9)
            most = 1 + int(done * (most_rows * most_columns - 1))
            sizes = [(r, c) for r in range(1, most_rows + 1) for c in range(1, most_columns + 1) if r * c <= most]
            rows, columns = sizes[rng.integers(len(sizes))]
        else:
            rows = int(rng.integers(fewest_rows, most_rows + 1))
            columns = int(rng.integers(fewest_columns, most_columns + 1))
        return rng.choice(scan_splits()[self.split], size=(rows, columns))

    def _questions(self, labels: NDArray[np.int64], turns: int, rng: np.random.Generator) -> list[tuple[str, str, str]]:
        """Different questions (kind, question, answer); fewer than `turns` when the page has no more."""
        names = list(self.task.kinds)
        weights = np.cumsum(list(self.task.kinds.values()))
        asked: dict[str, tuple[str, str, str]] = {}
        for draw in rng.random((4 * turns, 3)):
            kind = names[int(np.searchsorted(weights, draw[0] * weights[-1], side="right"))]
            question, answer = _ask(kind, labels, draw[1], draw[2], self.task.separator)
            asked.setdefault(question, (kind, question, answer))
            if len(asked) == turns:
                break
        return list(asked.values())


def _ask(kind: str, labels: NDArray[np.int64], u: float, v: float, separator: str) -> tuple[str, str]:
    """A question of a kind and its answer; u and v in [0, 1) choose what is asked about."""
    rows, columns = labels.shape
    row, column = int(u * rows), int(v * columns)
    if kind == "line":
        return f"What is on line {row + 1}?", separator.join(map(str, labels[row]))
    if kind == "cell":
        return f"Which digit is at row {row + 1}, column {column + 1}?", str(labels[row, column])
    if kind == "count":
        # Mostly a digit that is on the page; any digit otherwise, so that the answer may be 0.
        digit = labels[row, column] if u * rows % 1 < 0.7 else int(v * columns % 1 * 10)
        return f"How many {digit}s?", str((labels == digit).sum())
    return "Read the page.", "\n".join(separator.join(map(str, line)) for line in labels)
