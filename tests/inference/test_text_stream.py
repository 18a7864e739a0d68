"""Text from tokens one by one: whole characters, stop texts, and in sum what decoding at once gives."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from hybridvl.data.tokens import load_tokenizer
from hybridvl.inference.text_stream import TextStream

TOKENIZER = load_tokenizer()


def decode(tokens: list[int]) -> str:
    return str(TOKENIZER.decode(tokens, skip_special_tokens=True))


def byte_by_byte(tokens: list[int]) -> str:
    """A tokenizer whose tokens are bytes."""
    return bytes(tokens).decode("utf-8", "replace")


def pieces(stream: TextStream, tokens: list[int]) -> list[str]:
    return [*(stream.push(token) for token in tokens), stream.finish()]


@given(st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_text_comes_whole_and_at_once(text: str) -> None:
    tokens = TOKENIZER.encode(text, add_special_tokens=False)
    found = pieces(TextStream(decode), tokens)
    assert "".join(found) == decode(tokens)
    given_ = text.count("\N{REPLACEMENT CHARACTER}")
    assert "".join(found).count("\N{REPLACEMENT CHARACTER}") == given_  # no half characters
    if given_ == 0:
        assert found[-1] == ""  # nothing is kept back


@given(st.lists(st.integers(0, 255), max_size=40))
@settings(max_examples=200, deadline=None)
def test_bytes_that_are_no_text(tokens: list[int]) -> None:
    stream = TextStream(byte_by_byte)
    found = [stream.push(token) for token in tokens]
    together = "".join(found)
    whole = byte_by_byte(tokens)
    assert whole.startswith(together)
    assert len(whole) - len(together) <= 3  # no more waits than a character without its last byte
    assert together + stream.finish() == whole


@given(st.lists(st.integers(0, 511), max_size=60))
@settings(max_examples=100, deadline=None)
def test_any_tokens(tokens: list[int]) -> None:
    assert "".join(pieces(TextStream(decode), tokens)) == decode(tokens)


def test_a_character_of_four_bytes_waits_for_the_last() -> None:
    assert pieces(TextStream(byte_by_byte), [*"a🙂b".encode()]) == ["a", "", "", "", "🙂", "b", ""]


@given(text=st.text("ab", max_size=20), stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
@settings(max_examples=300, deadline=None)
def test_stop_texts(text: str, stops: list[str]) -> None:
    stream = TextStream(byte_by_byte, stops)
    found = ""
    for number, byte in enumerate(text.encode()):
        found += stream.push(byte)
        seen = text[: number + 1]
        assert stream.stopped == any(stop in seen for stop in stops)
        if stream.stopped:
            break
        # No more is kept back than could become a stop text.
        kept = seen[len(found) :]
        assert seen.startswith(found)
        assert not kept or any(stop.startswith(kept) for stop in stops)
    found += stream.finish()
    # The stop text that is complete first ends the row; of several, the one that begins first.
    ends = sorted((text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text)
    assert found == text[: ends[0][1] if ends else None]


@given(
    parts=st.lists(st.text("ab", min_size=1, max_size=5), max_size=6),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_stop_texts_in_tokens_of_any_length(parts: list[str], stops: list[str]) -> None:
    letters = "".join(parts)
    one_by_one = "".join(pieces(TextStream(byte_by_byte, stops), list(letters.encode())))
    stream = TextStream(lambda tokens: "".join(parts[token] for token in tokens), stops)
    assert "".join(pieces(stream, list(range(len(parts))))) == one_by_one


@pytest.fixture(scope="module")
def fallback() -> Tokenizer:
    """A tokenizer of Llama's kind: words that begin with U+2581, and a token for every byte."""
    words = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581Gr", "\u2581a", "b"]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [], byte_fallback=True))
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def test_a_tokenizer_that_writes_every_byte(fallback: Tokenizer) -> None:
    words = ["\u2581Gr", "<0xC3>", "<0xBC>", "b", "\u2581a", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>", "<s>", "\u2581a"]
    tokens = [fallback.token_to_id(word) for word in words]
    assert pieces(TextStream(fallback.decode), tokens) == ["Gr", "", "ü", "b", " a", "", "", "", "🙂", "", " a", ""]
    assert fallback.decode(tokens) == "Grüb a🙂 a"


def test_nothing_comes_after_a_stop_text() -> None:
    stream = TextStream(byte_by_byte, ["\n\n"])
    assert pieces(stream, [*b"one\n\ntwo"]) == ["o", "n", "e", "", "", "", "", "", ""]
    assert stream.stopped


@pytest.mark.parametrize("stops", [[], [""]])
def test_no_stop_texts(stops: list[str]) -> None:
    assert pieces(TextStream(byte_by_byte, stops), [*b"ab"]) == ["a", "b", ""]
