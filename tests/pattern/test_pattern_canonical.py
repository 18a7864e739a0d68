"""Canonical texts: the shortest by exhaustive search, tiled where that helps, quick at 4,096 layers."""

from __future__ import annotations

import itertools
import random
import time
from functools import cache

import pytest

from hybridvl.pattern import parse_pattern
from hybridvl.pattern.canonical import canonical


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ("full", "full"),
        ("full full", "full*2"),
        ("swa gdn swa gdn", "(swa gdn)*2"),
        ("(swa gdn*3)*9", "(swa gdn*3)*9"),
        ("swa gdn gdn gdn swa gdn gdn gdn full", "(swa gdn*3)*2 full"),
        ("full (full gdn)*5", "full (full gdn)*5"),
        ("full@36", "full*36"),
        ("(swa gdn*3)@36", "(swa gdn*3)*9"),
        ("(swa gdn*7)@36", "(swa gdn*7)@36"),
        ("(swa gdn*7)@39", "(swa gdn*7)@39"),
        ("(swa gdn*7)@12", "swa gdn*7 swa gdn*3"),
        ("((swa gdn*3)*2 full)*2 gdn", "((swa gdn*3)*2 full)*2 gdn"),
        ("(swa+mamba2 gdn)*3", "(swa+mamba2 gdn)*3"),
        ("gdn (swa gdn gdn gdn swa gdn)*2", "(gdn swa gdn*3 swa)@13"),
    ],
)
def test_known_texts(layers: str, text: str) -> None:
    assert str(parse_pattern(layers)) == text


@cache
def shortest(word: str) -> int:
    """Characters of the shortest text for a word of one-letter layers, by trying every split and every power."""
    if len(word) == 1:
        return 1
    found = min(shortest(word[:i]) + 1 + shortest(word[i:]) for i in range(1, len(word)))
    for period in range(1, len(word) // 2 + 1):
        if len(word) % period == 0 and word == word[:period] * (len(word) // period):
            repeated = shortest(word[:period]) + (2 if period > 1 else 0) + 1 + len(str(len(word) // period))
            found = min(found, repeated)
    return found


@pytest.mark.parametrize("alphabet", ["ab", "abc"])
def test_no_text_without_tiling_is_shorter(alphabet: str) -> None:
    longest = {2: 11, 3: 8}[len(alphabet)]
    for length in range(1, longest + 1):
        for word in map("".join, itertools.product(alphabet, repeat=length)):
            assert len(canonical(word)) <= shortest(word), word


def test_longer_words_are_nearly_shortest() -> None:
    source = random.Random(0)
    excess = 0
    for _ in range(60):
        unit = source.choices("ab", k=source.randrange(2, 9))
        word = "".join(source.choices("ab", k=5)) + "".join(unit) * 4 + "".join(source.choices("ab", k=5))
        excess += max(len(canonical(word)) - shortest(word), 0)
    assert excess == 0


def fibonacci(length: int) -> str:
    a, b = "a", "ab"
    while len(b) < length:
        a, b = b, b + a
    return b[:length]


@pytest.mark.parametrize(
    ("word", "most"),
    [
        ("a" * 4096, len("a*4096")),
        ("abbb" * 1024, len("(a b*3)*1024")),
        ("b" + "a" * 4095, len("b a*4095")),
        ("ab" * 1000 + "c" + "ab" * 1000, len("(a b)*1000 c (a b)*1000")),
        ((("ab" * 9 + "c") * 80 + "d") * 2, len("(((a b)*9 c)*80 d)*2")),
        (fibonacci(4096), 600),
        ("".join(random.Random(0).choices("ab", k=4096)), 8191),
        ("".join(map(chr, range(256, 256 + 4096))), 8191),
    ],
    ids=range(8),
)
def test_thousands_of_layers(word: str, most: int) -> None:
    start = time.perf_counter()
    assert len(canonical(word)) <= most
    assert time.perf_counter() - start < 10  # measured: 0.4 s at most
