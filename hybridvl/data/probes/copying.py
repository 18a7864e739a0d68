"""Selective copying and compression: symbols of a stream to be written again, all of them and in order."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hybridvl.data.probes.probe import Asked, Probe
from hybridvl.data.probes.sizes import bucket, load_prefix
from hybridvl.data.probes.symbols import ASK, LETTERS, LONGEST_STREAM
from hybridvl.data.task import Split, require_span
from hybridvl.layers.errors import ConfigError

BLANK = "."


class Symbols(NamedTuple):
    """Symbols among blanks: text, and places (symbols,), where in a stream of `length` they stand, ascending."""

    text: str
    places: NDArray[np.int64]
    length: int


class _Copying(Probe[Symbols]):
    """What both have in common: an alphabet, how the stream is written, and one question after it."""

    def __init__(self, symbols: int | tuple[int, int], alphabet: int, counts: tuple[int, int, int]) -> None:
        super().__init__(counts, "samples", {})
        self.symbols = require_span("data.task.symbols", symbols, LONGEST_STREAM)
        if not 2 <= alphabet <= len(LETTERS):
            raise ConfigError(f"data.task.alphabet: {alphabet}; expected a number from 2 to {len(LETTERS)}")
        self.alphabet = alphabet

    def show(self, drawn: Symbols, rng: np.random.Generator, split: Split) -> list[dict[str, Any]]:
        """The stream."""
        stream = [BLANK] * drawn.length
        for place, symbol in zip(drawn.places.tolist(), drawn.text, strict=True):
            stream[place] = symbol
        return [{"type": "text", "text": "".join(stream)}]

    def ask(self, drawn: Symbols) -> list[Asked]:
        """The symbols, in order."""
        return [Asked(ASK, drawn.text, self._kind(drawn), self.alphabet ** -len(drawn.text))]

    def _kind(self, drawn: Symbols) -> str:
        return f"symbols_{bucket(len(drawn.text))}"

    def _text(self, rng: np.random.Generator) -> str:
        count = int(rng.integers(self.symbols[0], self.symbols[1] + 1))
        return "".join(LETTERS[letter] for letter in rng.integers(self.alphabet, size=count).tolist())


class SelectiveCopying(_Copying):
    """Selective copying (Gu and Dao 2023, arXiv:2312.00752; as the mad-lab repository has it).

    A stream shows random capital letters among blanks, "..C.A...AF..", and the answer is the letters: "CAAF". The lag
    of an answer is how far from the stream's end its first letter stands, 1 for the last symbol; every lag is as likely
    as any other that has room for the letters. Kinds are "lag_17_32" and so on; with a range of symbols they begin with
    "symbols_5_8_". Guessing n letters is right alphabet ** -n of the times.

    Other than in mad-lab the stream may end in blanks, and the letters are written as a reply, one after the other and
    each in sight of those before it, not in one go in place of further blanks.

    Args:
        symbols: fewest and most letters among the blanks, or how many each stream has.
        length: fewest and most symbols of a stream, blanks too, or how many each has.
        alphabet: how many different letters there are.
        train_samples: training streams in an epoch.
        val_samples: validation streams.
        test_samples: test streams.
    """

    def __init__(
        self,
        symbols: int | tuple[int, int] = 4,
        length: int | tuple[int, int] = 64,
        alphabet: int = 16,
        train_samples: int = 16_000,
        val_samples: int = 256,
        test_samples: int = 1_000,
    ) -> None:
        super().__init__(symbols, alphabet, (train_samples, val_samples, test_samples))
        self.length = require_span("data.task.length", length, LONGEST_STREAM)
        if self.length[0] < self.symbols[1]:
            raise ConfigError(
                f"data.task.length: {length if isinstance(length, int) else list(self.length)}; expected at least the "
                f"most symbols, {self.symbols[1]}"
            )

    def draw(self, rng: np.random.Generator, split: Split) -> Symbols:
        """Letters and where they stand."""
        text = self._text(rng)
        length = int(rng.integers(self.length[0], self.length[1] + 1))
        # The first place is drawn first, so that every lag is as likely as any other.
        first = int(rng.integers(length - len(text) + 1))
        others = first + 1 + rng.choice(length - first - 1, len(text) - 1, replace=False)
        return Symbols(text, np.sort(np.append(others, first)), length)

    def _kind(self, drawn: Symbols) -> str:
        lag = drawn.length - int(drawn.places[0])
        return f"{load_prefix('symbols', len(drawn.text), self.symbols)}lag_{bucket(lag)}"


class Compression(_Copying):
    """Compression: how many random symbols a model's state holds; after mad-lab's task of this name.

    A stream shows random capital letters, "CAAFKB", and the answer is all of them in order. Kinds are "symbols_5_8" and
    so on: each letter comes as long after it was shown as there are letters, so that load and distance are one.
    Guessing n letters is right alphabet ** -n of the times.

    In mad-lab (Poli et al. 2024, arXiv:2403.17844) a separate decoder finds each letter from the last token's vector
    and the letter's number, so that nothing but that vector can have held them. A conversation has no such
    narrow place: here a model with a state of constant size must have put them all into it, but attention may look
    back at them, and letters already written are seen.

    Args:
        symbols: fewest and most letters of a stream, or how many each has.
        alphabet: how many different letters there are.
        train_samples: training streams in an epoch.
        val_samples: validation streams.
        test_samples: test streams.
    """

    def __init__(
        self,
        symbols: int | tuple[int, int] = (2, 16),
        alphabet: int = 16,
        train_samples: int = 16_000,
        val_samples: int = 256,
        test_samples: int = 1_000,
    ) -> None:
        super().__init__(symbols, alphabet, (train_samples, val_samples, test_samples))

    def draw(self, rng: np.random.Generator, split: Split) -> Symbols:
        """Letters without blanks."""
        text = self._text(rng)
        return Symbols(text, np.arange(len(text)), len(text))
