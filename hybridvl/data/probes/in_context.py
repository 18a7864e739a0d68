"""In-context recall and noisy recall: what a stream of recurring keys said last about some of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hybridvl.data.probes.probe import Asked, Probe
from hybridvl.data.probes.sizes import bucket, load_prefix, require_number
from hybridvl.data.probes.symbols import ASK, LONGEST_STREAM, draw_pairs, require_labels, signs_text
from hybridvl.data.task import Split, require_span


class KeyStream(NamedTuple):
    """A stream of recurring keys.

    keys, values: the map of the stream. slots: (length,) which key each slot shows, -1 for noise. noise: two signs for
    each slot of noise, in order. asked: the keys that are asked for, in order.
    """

    keys: list[str]
    values: list[str]
    slots: NDArray[np.int64]
    noise: str
    asked: list[int]


class InContextRecall(Probe[KeyStream]):
    """In-context recall (Poli et al. 2024, arXiv:2403.17844, as the mad-lab repository has it).

    A stream has a map of its own from keys, capital letters, to values, digits. Each of its slots shows a random key
    with its value, "A4C7A4K1", and then keys that were shown are asked for: "?C". The lag of an answer is how many
    slots ago its key was last shown, 1 for the last slot; as keys recur, small lags are frequent. Kinds are "lag_5_8"
    and so on; with a range of keys they begin with "keys_5_8_", by how many keys the map has. Guessing is right 1 time
    in 10 ** digits.

    Other than in mad-lab only the answers are learnt, not the whole stream, and the keys are asked for at its end, each
    in a turn of its own, not where they recur within.

    Args:
        keys: fewest and most keys of a stream's map, or how many each has.
        length: fewest and most slots of a stream, or how many each has.
        queries: different keys that are asked for at most.
        letters: letters of a key.
        digits: digits of a value.
        train_samples: training streams in an epoch.
        val_samples: validation streams.
        test_samples: test streams.
    """

    noise = 0.0

    def __init__(
        self,
        keys: int | tuple[int, int] = 8,
        length: int | tuple[int, int] = 32,
        queries: int = 4,
        letters: int = 1,
        digits: int = 1,
        train_samples: int = 16_000,
        val_samples: int = 256,
        test_samples: int = 1_000,
    ) -> None:
        sizes = {"letters": letters, "digits": digits, "queries": queries}
        super().__init__((train_samples, val_samples, test_samples), "samples", sizes)
        self.keys = require_span("data.task.keys", keys, LONGEST_STREAM)
        self.length = require_span("data.task.length", length, LONGEST_STREAM)
        require_labels(letters, self.keys[1], "keys")
        self.queries = queries
        self.letters = letters
        self.digits = digits

    def draw(self, rng: np.random.Generator, split: Split) -> KeyStream:
        """Map, slots and questions of a stream."""
        count = int(rng.integers(self.keys[0], self.keys[1] + 1))
        length = int(rng.integers(self.length[0], self.length[1] + 1))
        keys, values = draw_pairs(rng, count, self.letters, self.digits)
        slots = rng.integers(count, size=length)
        noisy = rng.random(length) < self.noise
        noisy[rng.integers(length)] = False
        shown = np.unique(slots[~noisy])
        return KeyStream(
            keys,
            values,
            np.where(noisy, -1, slots),
            signs_text(rng, 2 * int(noisy.sum())),
            rng.choice(shown, min(self.queries, len(shown)), replace=False).tolist(),
        )

    def show(self, drawn: KeyStream, rng: np.random.Generator, split: Split) -> list[dict[str, Any]]:
        """The slots."""
        noise = iter(drawn.noise)
        pairs = [key + value for key, value in zip(drawn.keys, drawn.values, strict=True)]
        text = "".join(next(noise) + next(noise) if slot < 0 else pairs[slot] for slot in drawn.slots.tolist())
        return [{"type": "text", "text": text}]

    def ask(self, drawn: KeyStream) -> list[Asked]:
        """The values of some keys that were shown."""
        prefix = load_prefix("keys", len(drawn.keys), self.keys)
        found = []
        for key in drawn.asked:
            lag = len(drawn.slots) - int(np.flatnonzero(drawn.slots == key)[-1])
            kind = f"{prefix}lag_{bucket(lag)}"
            found.append(Asked(ASK + drawn.keys[key], drawn.values[key], kind, 0.1**self.digits))
        return found


class NoisyRecall(InContextRecall):
    """Noisy in-context recall (mad-lab's): `InContextRecall` with noise, two signs, in place of some of the pairs.

    At least one slot of a stream is no noise. Lags count noise, too. The rest is as in `InContextRecall`.

    Args:
        noise: how likely a slot is noise.
        keys: fewest and most keys of a stream's map, or how many each has.
        length: fewest and most slots of a stream, or how many each has.
        queries: different keys that are asked for at most.
        letters: letters of a key.
        digits: digits of a value.
        train_samples: training streams in an epoch.
        val_samples: validation streams.
        test_samples: test streams.
    """

    def __init__(
        self,
        noise: float = 0.2,
        keys: int | tuple[int, int] = 8,
        length: int | tuple[int, int] = 32,
        queries: int = 4,
        letters: int = 1,
        digits: int = 1,
        train_samples: int = 16_000,
        val_samples: int = 256,
        test_samples: int = 1_000,
    ) -> None:
        super().__init__(keys, length, queries, letters, digits, train_samples, val_samples, test_samples)
        require_number("noise", noise, 1)
        self.noise = noise
