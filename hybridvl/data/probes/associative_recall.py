"""Multi-query associative recall: keys and their values, then the keys again among filler, each to be answered."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hybridvl.data.probes.probe import Asked, Probe
from hybridvl.data.probes.sizes import bucket, load_prefix, require_number
from hybridvl.data.probes.symbols import ASK, LONGEST_STREAM, draw_pairs, require_labels, signs_text
from hybridvl.data.task import Split, require_span
from hybridvl.layers.errors import ConfigError


class Pairs(NamedTuple):
    """A stream of key-value pairs and of queries.

    keys, values: of the pairs, in order. asked: which pairs the queries ask for, in order. gaps: (queries,) slots
    between the last pair and each query. filler: the signs between them, two for each slot.
    """

    keys: list[str]
    values: list[str]
    asked: list[int]
    gaps: NDArray[np.int64]
    filler: str


class AssociativeRecall(Probe[Pairs]):
    """Multi-query associative recall (MQAR; Arora et al. 2023, arXiv:2312.04927, as the zoology repository has it).

    A stream is made of slots of two symbols. First come the pairs, "A4C7K1"; after them, some of the slots ask for a
    key, "?C", once each, and the others are filler. How far behind the pairs a key is asked for follows a power law:
    gap g, from 0, has a weight of (g + 1) ** (power - 1), and no two keys have the same gap. The lag of an answer is
    how many slots ago its pair came, 1 for the slot before. Kinds are "lag_5_8" and so on; with a range of pairs they
    begin with "pairs_5_8_". Guessing is right 1 time in 10 ** digits.

    Other than in zoology a query is a turn of the conversation, with the filler before it, and the answer a reply of
    its own; filler is signs, which are no keys, and none follows the last query; keys are capital letters and values
    digits, which may occur twice in a stream, so that no answer can be found by leaving out the others.

    Args:
        pairs: fewest and most pairs of a stream, or how many each has.
        length: fewest and most slots of a stream, or how many each has; null: just enough for pairs and queries.
        queries: keys that are asked for at most; null: all.
        power: exponent of the gaps; 0.01, zoology's, keeps most queries near the pairs, 1 makes all gaps as likely.
        letters: letters of a key.
        digits: digits of a value.
        train_samples: training streams in an epoch.
        val_samples: validation streams.
        test_samples: test streams.
    """

    def __init__(
        self,
        pairs: int | tuple[int, int] = 8,
        length: int | tuple[int, int] | None = 32,
        queries: int | None = None,
        power: float = 0.01,
        letters: int = 1,
        digits: int = 1,
        train_samples: int = 16_000,
        val_samples: int = 256,
        test_samples: int = 1_000,
    ) -> None:
        sizes = {"letters": letters, "digits": digits, "queries": 1 if queries is None else queries}
        super().__init__((train_samples, val_samples, test_samples), "samples", sizes)
        self.pairs = require_span("data.task.pairs", pairs, LONGEST_STREAM)
        self.length = None if length is None else require_span("data.task.length", length, 2 * LONGEST_STREAM)
        self.queries = queries
        require_labels(letters, self.pairs[1], "pairs")
        needed = self.pairs[1] + self._queries(self.pairs[1])
        if self.length is not None and self.length[0] < needed:
            raise ConfigError(
                f"data.task.length: {length if isinstance(length, int) else list(self.length)}; expected at least "
                f"{needed} slots, for {self.pairs[1]} pairs and {self._queries(self.pairs[1])} queries"
            )
        require_number("power", power, 10)
        self.power = power
        self.letters = letters
        self.digits = digits

    def draw(self, rng: np.random.Generator, split: Split) -> Pairs:
        """Pairs, queries and filler of a stream."""
        pairs = int(rng.integers(self.pairs[0], self.pairs[1] + 1))
        queries = self._queries(pairs)
        length = pairs + queries if self.length is None else int(rng.integers(self.length[0], self.length[1] + 1))
        keys, values = draw_pairs(rng, pairs, self.letters, self.digits)
        weights = np.arange(1, length - pairs + 1) ** (self.power - 1)
        gaps = np.sort(rng.choice(length - pairs, queries, replace=False, p=weights / weights.sum()))
        return Pairs(
            keys,
            values,
            rng.choice(pairs, queries, replace=False).tolist(),
            gaps,
            signs_text(rng, 2 * int(gaps[-1] + 1 - queries)),
        )

    def show(self, drawn: Pairs, rng: np.random.Generator, split: Split) -> list[dict[str, Any]]:
        """The pairs."""
        pairs = zip(drawn.keys, drawn.values, strict=True)
        return [{"type": "text", "text": "".join(key + value for key, value in pairs)}]

    def ask(self, drawn: Pairs) -> list[Asked]:
        """The queries, each after its filler."""
        found = []
        filled = 0
        prefix = load_prefix("pairs", len(drawn.keys), self.pairs)
        for number, (pair, gap) in enumerate(zip(drawn.asked, drawn.gaps.tolist(), strict=True)):
            filler = drawn.filler[filled : 2 * (gap - number)]
            filled = 2 * (gap - number)
            lag = len(drawn.keys) + gap - pair
            question = filler + ASK + drawn.keys[pair]
            found.append(Asked(question, drawn.values[pair], f"{prefix}lag_{bucket(lag)}", 0.1**self.digits))
        return found

    def _queries(self, pairs: int) -> int:
        return pairs if self.queries is None else min(self.queries, pairs)
