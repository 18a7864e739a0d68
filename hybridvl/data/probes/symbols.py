"""The symbols of probes: capital letters, digits and signs, each of them one token of the built-in tokenizer."""

from __future__ import annotations

import numpy as np

from hybridvl.layers.errors import ConfigError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SIGNS = "+*=/|~^<>;:_"
"""What fills a stream; never part of a key or a value."""

ASK = "?"
"""What a question about symbols begins with."""

LONGEST_STREAM = 100_000


def letters_text(number: int, letters: int) -> str:
    """Label number `number` of so many capital letters."""
    text = ""
    for _ in range(letters):
        number, letter = divmod(number, len(LETTERS))
        text = LETTERS[letter] + text
    return text


def digits_text(number: int, digits: int) -> str:
    """A number in so many digits, with leading zeros."""
    return str(number).zfill(digits)


def draw_pairs(rng: np.random.Generator, count: int, letters: int, digits: int) -> tuple[list[str], list[str]]:
    """So many keys, of so many letters and all different, and a value of so many digits for each."""
    names = rng.choice(len(LETTERS) ** letters, count, replace=False)
    values = rng.integers(10**digits, size=count)
    keys = [letters_text(name, letters) for name in names.tolist()]
    return keys, [digits_text(value, digits) for value in values.tolist()]


def signs_text(rng: np.random.Generator, count: int) -> str:
    """So many random signs."""
    return "".join(SIGNS[sign] for sign in rng.integers(len(SIGNS), size=count).tolist())


def require_labels(letters: int, needed: int, what: str) -> None:
    """Raise ConfigError unless labels of so many letters are enough for all of what bears one."""
    labels = len(LETTERS) ** letters
    if needed > labels:
        raise ConfigError(
            f"data.task.letters: {letters}, which give {labels} labels; expected enough for {needed} {what}"
        )
