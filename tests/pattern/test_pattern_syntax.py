"""The grammar of patterns: what parses to which layers, what is refused where, and that work is linear in the text."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hybridvl.layers import ConfigError
from hybridvl.pattern import Pattern, PatternError, parse_pattern

NAMES = ("a", "b", "wide", "swa")
MIXERS = {"a": {"type": "swa"}, "b": {"type": "gdn"}, "wide": {"type": "swa", "window": 8192}}


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("full", ["full"]),
        ("full*3", ["full"] * 3),
        ("(swa gdn*3)*2", ["swa", "gdn", "gdn", "gdn"] * 2),
        ("(swa gdn*7)@12", (["swa"] + ["gdn"] * 7 + ["swa"] + ["gdn"] * 3)),
        ("swa gdn*7 @ 12", (["swa"] + ["gdn"] * 7 + ["swa"] + ["gdn"] * 3)),
        ("(swa gdn*7)@3", ["swa", "gdn", "gdn"]),
        ("full@4", ["full"] * 4),
        ("swa+mamba2", ["swa+mamba2"]),
        ("(swa + mamba2)*2 gdn", ["swa+mamba2", "swa+mamba2", "gdn"]),
        ("swa+mamba2*2", ["swa+mamba2"] * 2),
        ("swa (gdn full)*2", ["swa", "gdn", "full", "gdn", "full"]),
        ("(swa)(gdn)", ["swa", "gdn"]),
        (" ( swa\n\tgdn * 2 ) * 2 ", ["swa", "gdn", "gdn"] * 2),
        ("swa(window=4096)", ["swa(window=4096)"]),
        ("swa( window = 16 ,heads=2 )", ["swa(heads=2, window=16)"]),
        ("swa()", ["swa"]),
        ("swa(window=16)+mamba2(expand=2) gdn", ["swa(window=16)+mamba2(expand=2)", "gdn"]),
        ("full*0004", ["full"] * 4),
        ("wide gdn", ["wide", "gdn"]),
    ],
)
def test_layers(text: str, layers: list[str]) -> None:
    pattern = parse_pattern(text, MIXERS)
    assert pattern.layers == layers
    assert len(pattern) == len(layers)


@pytest.mark.parametrize(
    ("written", "value", "canonical"),
    [
        ("4096", 4096, "4096"),
        ("-3", -3, "-3"),
        ("+3", 3, "3"),
        ("2.5", 2.5, "2.5"),
        (".5", 0.5, "0.5"),
        ("1e-6", 1e-6, "1e-06"),
        ("1E16", 1e16, "1e+16"),
        ("2.", 2.0, "2.0"),
        ("true", True, "true"),
        ("false", False, "false"),
        ("null", None, "null"),
        ("auto", "auto", "auto"),
        ("'auto'", "auto", "auto"),
        ('"auto"', "auto", "auto"),
        ("'true'", "true", '"true"'),
        ("'4'", "4", '"4"'),
        ("''", "", '""'),
        ("'a b, c)'", "a b, c)", '"a b, c)"'),
        (r'"a\"\\\n\u00e9"', 'a"\\\né', r'"a\"\\\n\u00e9"'),
        ("[]", (), "[]"),
        ("[1, 2.5,x]", (1, 2.5, "x"), "[1, 2.5, x]"),
    ],
)
def test_option_values(written: str, value: object, canonical: str) -> None:
    pattern = parse_pattern(f"swa(key={written})")
    found = pattern.specs[0].mixers[0].options["key"]
    assert (found, type(found)) == (value, type(value))
    assert str(pattern) == f"swa(key={canonical})"
    assert parse_pattern(str(pattern)).specs[0].mixers[0].options == {"key": value}


@pytest.mark.parametrize(
    ("text", "column", "parts"),
    [
        ("", 1, ["the end", "a mixer name or '('", "the pattern is empty"]),
        ("   ", 4, ["the pattern is empty"]),
        ("(swa gdm*3)*9", 6, ["unknown mixer 'gdm'", "did you mean 'gdn'", "full, gdn, mamba2, swa"]),
        ("wide", 1, ["unknown mixer 'wide'"]),
        ("swa+mamba3", 5, ["'mamba3'", "did you mean 'mamba2'"]),
        ("swa gdn)", 8, ["')' without a '('"]),
        ("(swa (gdn*3", 6, ["never closed"]),
        ("(swa gdn", 1, ["never closed"]),
        ("()", 2, ["found ')'", "at least one layer"]),
        ("gdn*", 5, ["the end", "whole number after '*'"]),
        ("gdn*x", 5, ["found 'x'", "whole number after '*'"]),
        ("gdn**3", 5, ["found '*'", "whole number after '*'"]),
        ("gdn*-3", 5, ["found '-'"]),
        ("gdn*0", 5, ["at least 1"]),
        ("gdn*2*2", 6, ["found '*'", "a mixer name or '(', '@' or the end (", "parentheses make a unit: (gdn*3)*2"]),
        ("(gdn)*2*2", 8, ["a mixer name or '(', '@' or the end ("]),
        ("(gdn*2*2)", 7, ["a mixer name or '(' or ')' ("]),
        ("gdn*2 gdn=", 10, ["a mixer name or '(', '*', '@' or the end ("]),
        ("gdn*2.5", 6, ["found '.'"]),
        ("3*gdn", 1, ["found '3'", "a repetition follows what it repeats"]),
        ("swa,gdn", 4, ["found ','", "separated by spaces"]),
        ("swa+", 5, ["the end", "a mixer name"]),
        ("swa+(gdn)", 5, ["found '('", "a mixer name"]),
        ("(swa gdn)+full", 10, ["'+' joins mixers, not groups"]),
        ("@36", 1, ["found '@'"]),
        ("swa@", 5, ["whole number after '@'"]),
        ("swa@0", 5, ["at least 1"]),
        ("swa@36 gdn", 8, ["found 'gdn'", "the end of the pattern"]),
        ("(swa@36)", 5, ["found '@'", "'@' tiles the whole pattern and stands at its end"]),
        ("(swa@2)*3", 5, ["found '@'", "'*' or ')'", "'@' tiles the whole pattern and stands at its end"]),
        ("swa (window=4)", 12, ["found '='", "without a space"]),
        ("swa(gdn)", 8, ["'=' after option 'gdn'", "stand apart"]),
        ("swa(4=window)", 5, ["the name of an option"]),
        ("swa(window=)", 12, ["a value"]),
        ("swa(window=4", 13, ["the end", "','"]),
        ("swa(window=4,)", 14, ["the name of an option"]),
        ("swa(window=4 heads=2)", 14, ["found 'heads'", "','"]),
        ("swa(window=4, window=5)", 15, ["'window' is given twice"]),
        ("swa(window=[1, [2]])", 16, ["found '['"]),
        ("swa(window=[1,])", 15, ["a value"]),
        ("swa(key='open)", 9, ['found "\'"', "a value"]),
        (r'swa(key="\q")', 9, ["unknown escape"]),
        ("swa(window=1e999)", 12, ["1e999", "finite"]),
        (f"swa(window={'9' * 5000})", 12, ["99999999999999999...", "at most 64 characters"]),
        ("gdn*1000000000", 5, ["1000000000 x 1 layer", "4096"]),
        (f"gdn*{'9' * 100000}", 5, ["99999999999999999...", "4096"]),
        ("gdn@5000", 5, ["5000", "4096"]),
        ("(swa gdn*3)*1025", 13, ["1025 x 4 layers", "4096"]),
        ("((((gdn*99)*99)*99)*99)*99", 13, ["99 x 99 layers", "4096"]),
        ("gdn*4096 swa", 10, ["more than 4096 layers"]),
        ("gdn*4097@36", 5, ["4096"]),
    ],
)
def test_refusals(text: str, column: int, parts: list[str]) -> None:
    with pytest.raises(PatternError) as caught:
        parse_pattern(text)
    error = caught.value
    assert error.column == column
    message, shown, caret = str(error).split("\n")
    assert message == f"layer pattern, column {column}: {error.problem}"
    assert [part for part in parts if part not in error.problem] == []
    if column <= len(text):
        assert shown[caret.index("^")] == text[column - 1]
    assert caret.strip() == "^"
    assert len(shown) < 120


def test_the_whole_message_of_an_unknown_mixer() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_pattern("(swa gdm*3)*9", {"mine": {"type": "gdn"}})
    assert str(caught.value) == (
        "layer pattern, column 6: unknown mixer 'gdm', did you mean 'gdn'? (known: full, gdn, mamba2, mine, swa)\n"
        "  (swa gdm*3)*9\n"
        "       ^"
    )


def test_a_long_pattern_is_shown_around_the_column() -> None:
    with pytest.raises(PatternError) as caught:
        parse_pattern("swa\n" * 100 + "? " + "gdn " * 100)
    _, shown, caret = str(caught.value).split("\n")
    assert shown == f"  ...{'swa ' * 15}? {'gdn ' * 5}"[: 5 + 60 + 20] + "..."
    assert shown[caret.index("^")] == "?"


@pytest.mark.parametrize("text", [None, 3, ["swa"], b"swa"])
def test_only_strings_are_patterns(text: object) -> None:
    with pytest.raises(PatternError, match="expected a string"):
        parse_pattern(text)  # type: ignore[arg-type]


def test_layer_lists() -> None:
    pattern = parse_pattern("(swa(window=16) gdn*3 swa+mamba2)*2")
    assert Pattern.from_layers(pattern.layers) == pattern
    assert Pattern.from_layers(["wide", "b"], MIXERS).layers == ["wide", "b"]
    for wrong, message in [
        (["swa", "gdn*2"], r"layers\[1\]: 'gdn\*2' is 2 layers; expected one"),
        (["swa", "gdn("], r"layers\[1\]: .*column 5"),
        ([], "a list of 0; expected 1 to 4096"),
        (["swa"] * 4097, "a list of 4097"),
        (["swa", "gdm"], "did you mean 'gdn'"),
    ]:
        with pytest.raises(PatternError, match=message):
            Pattern.from_layers(wrong)


def test_equality_is_of_layers_not_of_spelling() -> None:
    one, other = parse_pattern("(swa gdn gdn)*2"), parse_pattern("swa gdn*2 swa gdn*2")
    assert one == other
    assert hash(one) == hash(other)
    assert one != parse_pattern("(swa gdn)*3")
    assert repr(one) == "Pattern('(swa gdn*2)*2')"


@pytest.mark.parametrize(
    "text",
    [
        "(" * 100_000 + "gdn" + ")" * 100_000,
        "(" * 4000 + "gdn" + " gdn)" * 4000,
        "(" * 100_000,
        "(" * 100_000 + "gdn" + ")" * 99_999,
        ")" * 100_000,
        "swa+" * 100_000,
        "gdn " * 200_000,
        "swa(" + "a=1," * 100_000,
        'swa(a="' + "\\n" * 200_000,
        "swa(a=" + "1" * 400_000 + ")",
        "1" * 400_000,
    ],
    ids=range(11),
)
def test_long_and_deep_patterns_take_linear_time(text: str) -> None:
    start = time.perf_counter()
    if text.startswith("(") and text.endswith(")") and text.count("(") == text.count(")"):
        assert len(parse_pattern(text)) == text.count("gdn")
    else:
        with pytest.raises(PatternError) as caught:
            parse_pattern(text)
        assert len(str(caught.value)) < 500
    assert time.perf_counter() - start < 10  # measured: 1.2 s at most; quadratic work would take minutes


@st.composite
def groups(draw: st.DrawFn, depth: int = 2) -> tuple[str, list[str]]:
    """Random groups and, expanded here by other means, their layers (at most 4096)."""
    written, layers = [], []
    for _ in range(draw(st.integers(1, 3))):
        if depth and draw(st.booleans()):
            inner_text, inner = draw(groups(depth - 1))
            unit = f"({inner_text})"
        else:
            inner = [draw(layer())]
            unit = inner[0]
        count = draw(st.integers(1, 5))
        written.append(unit if count == 1 else f"{unit}*{count}")
        layers += inner * count
    return " ".join(written), layers[:4096]


@st.composite
def layer(draw: st.DrawFn) -> str:
    mixers = []
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        options = draw(st.dictionaries(st.sampled_from("xyz"), st.integers(-9, 9), max_size=2))
        inside = ", ".join(f"{key}={options[key]}" for key in sorted(options))
        mixers.append(draw(st.sampled_from(NAMES)) + (f"({inside})" if inside else ""))
    return "+".join(mixers)


@settings(max_examples=600, deadline=None)
@given(groups(), st.one_of(st.none(), st.integers(1, 200)))
def test_random_structures(drawn: tuple[str, list[str]], depth: int | None) -> None:
    text, layers = drawn
    if depth is not None:
        text, layers = f"{text} @{depth}", (layers * depth)[:depth]
    if len(layers) < 4096:
        pattern = parse_pattern(text, MIXERS)
        assert pattern.layers == layers
        assert_round_trip(pattern)


TOKENS = (
    *NAMES,
    "gdn",
    "(",
    ")",
    "*",
    "*2",
    "*13",
    "@",
    "@7",
    "+",
    " ",
    "=",
    ",",
    "swa(",
    "x=1",
    "'s'",
    "[",
    "]",
    "0.5",
)


def parse_or_refuse(text: str) -> None:
    refusal = None
    try:
        pattern = parse_pattern(text, MIXERS)
    except PatternError as error:
        refusal = error
    if refusal is None:
        assert_round_trip(pattern)
    else:
        assert refusal.column is not None
        assert 1 <= refusal.column <= len(text) + 1


def assert_round_trip(pattern: Pattern) -> None:
    again = parse_pattern(str(pattern), MIXERS)
    assert again == pattern
    assert str(again) == str(pattern)


@settings(max_examples=6000, deadline=None)
@given(st.lists(st.sampled_from(TOKENS), max_size=14).map("".join))
@example("swa(x='\ud800')")
@example("a*²")
def test_random_tokens_parse_or_are_refused(text: str) -> None:
    parse_or_refuse(text)


@settings(max_examples=4000, deadline=None)
@given(st.one_of(st.text(max_size=30), st.text(alphabet="ab()*@+,= 0123456789.\"'\\[]-e", max_size=30)))
def test_random_text_parses_or_is_refused(text: str) -> None:
    parse_or_refuse(text)
