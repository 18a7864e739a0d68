"""The grammar of layer patterns: text to a flat list of layers, in time linear in the text, without recursion.

pattern := group+ ["@" INT]        "@36" tiles the groups to exactly 36 layers
group   := unit ["*" INT]
unit    := layer | "(" group+ ")"
layer   := mixer ("+" mixer)*
mixer   := NAME ["(" [option ("," option)*] ")"]          the "(" follows its NAME without a space
option  := NAME "=" value
value   := number | "true" | "false" | "null" | NAME | string | "[" [value ("," value)*] "]"     lists do not nest
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import NoReturn

from hybridvl.pattern.errors import PatternError

MAX_LAYERS = 4096

Scalar = int | float | bool | str | None
Value = Scalar | tuple[Scalar, ...]

_SPACE = re.compile(r"\s*")
_NAME = re.compile(r"[^\W\d]\w*")
_DIGITS = re.compile(r"[0-9]+")
_NUMBER = re.compile(r"[+-]?(?:[0-9]++(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_DOUBLE_QUOTED = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_SINGLE_QUOTED = re.compile(r"'[^']*'")
_MAX_NUMBER = 64  # characters of a number; Python refuses to convert very long ones
_WORDS: dict[str, Scalar] = {"true": True, "false": False, "null": None}


@dataclass(frozen=True)
class MixerSpec:
    """A mixer as written.

    Attributes:
        name: registered or named mixer.
        options: values by key, in alphabetical order.
        at: offset of the name in the source; option_at: offsets of the options' keys.
    """

    name: str
    options: dict[str, Value]
    at: int
    option_at: dict[str, int]

    def __str__(self) -> str:
        options = ", ".join(f"{key}={format_value(value)}" for key, value in self.options.items())
        return f"{self.name}({options})" if options else self.name


@dataclass(frozen=True)
class LayerSpec:
    """One layer as written: its mixers, side by side where there are several, and its canonical text."""

    mixers: tuple[MixerSpec, ...]
    text: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", "+".join(map(str, self.mixers)))


def format_value(value: Value) -> str:
    """An option's value as the grammar writes it; parsing gives the same value back."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(format_value, value))}]"
    if isinstance(value, str):
        return value if _NAME.fullmatch(value) and value not in _WORDS else json.dumps(value)
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def parse_layers(text: str) -> list[LayerSpec]:
    """All layers of a pattern, repetitions written out; raises PatternError."""
    if not isinstance(text, str):
        raise PatternError(f"layer pattern: {text!r}; expected a string such as '(swa gdn*3)*9'")
    return _Parser(text).pattern()


class _Parser:
    """A cursor over the text; open groups lie on a stack of their own, so that depth costs no recursion."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.open: list[tuple[int, list[LayerSpec]]] = []  # offset of each open "(" and the layers before it
        self.layers: list[LayerSpec] = []  # of the innermost open group so far
        self.repeated = False  # whether the unit before the cursor has its "*" INT

    def pattern(self) -> list[LayerSpec]:
        while True:
            self.skip_space()
            character = self.peek()
            if character == "(":
                self.open.append((self.at, self.layers))
                self.layers = []
                self.at += 1
            elif character == ")":
                self.close_group()
            elif _NAME.match(self.text, self.at):
                start, layer = self.at, self.layer()
                self.add([layer], self.repetition(1), start)
            elif self.layers and (not character or (character == "@" and not self.open)):
                break
            else:
                besides = self.expected_besides() if self.layers else ""
                self.refuse(f"a mixer name or '('{besides}", self.unit_hint(character))
        if self.open:
            raise PatternError("this '(' is never closed; expected a ')' for it", self.text, self.open[-1][0])
        return self.tiled() if character == "@" else self.layers

    def close_group(self) -> None:
        if not self.open:
            raise PatternError(
                "found ')' without a '(' before it; expected a layer, '@' or the end", self.text, self.at
            )
        if not self.layers:
            self.refuse("at least one layer between '(' and ')'")
        self.at += 1
        inner = self.layers
        start, self.layers = self.open.pop()
        count = self.repetition(len(inner))
        self.skip_space()
        if self.peek() == "+":
            self.refuse(f"a layer{self.expected_besides()}", "'+' joins mixers, not groups")
        self.add(inner, count, start)

    def add(self, layers: list[LayerSpec], count: int, at: int) -> None:
        if len(self.layers) + len(layers) * count > MAX_LAYERS:
            raise PatternError(f"more than {MAX_LAYERS} layers up to here; expected at most that many", self.text, at)
        repeated = layers * count if count > 1 else layers
        if self.layers:
            self.layers.extend(repeated)
        else:
            self.layers = repeated  # taken over, not copied: 100,000 nested parentheses stay linear

    def repetition(self, unit: int) -> int:
        """The INT of "*" INT after a unit of that many layers, or 1."""
        self.skip_space()
        self.repeated = self.peek() == "*"
        if not self.repeated:
            return 1
        self.at += 1
        return self.count("'*'", MAX_LAYERS // unit, f"x {unit} layer{'s' if unit > 1 else ''}")

    def tiled(self) -> list[LayerSpec]:
        self.at += 1
        depth = self.count("'@'", MAX_LAYERS, "layers")
        self.skip_space()
        if self.at < len(self.text):
            self.refuse("the end of the pattern after '@' and the number of layers")
        return (self.layers * -(-depth // len(self.layers)))[:depth]

    def count(self, after: str, most: int, what: str) -> int:
        """A number from 1 to `most`; the digits are counted before they are converted."""
        self.skip_space()
        match = _DIGITS.match(self.text, self.at)
        if match is None:
            self.refuse(f"a whole number after {after}")
        digits = match.group().lstrip("0")
        if not digits:
            self.refuse(f"a whole number of at least 1 after {after}")
        if len(digits) > len(str(MAX_LAYERS)) or int(digits) > most:
            shown = digits if len(digits) <= 20 else f"{digits[:17]}..."
            problem = f"found {shown} {what}; expected at most {MAX_LAYERS} layers in all"
            raise PatternError(problem, self.text, self.at)
        self.at = match.end()
        return int(digits)

    def layer(self) -> LayerSpec:
        mixers = [self.mixer()]
        while True:
            self.skip_space()
            if self.peek() != "+":
                return LayerSpec(tuple(mixers))
            self.at += 1
            self.skip_space()
            mixers.append(self.mixer())

    def mixer(self) -> MixerSpec:
        at, name = self.at, self.name("a mixer name")
        options: dict[str, Value] = {}
        option_at: dict[str, int] = {}
        if self.peek() == "(":
            self.at += 1
            while self.skip_space() != ")" or options:
                key_at, key = self.at, self.name("the name of an option" if options else "the name of an option or ')'")
                if key in options:
                    raise PatternError(f"option {key!r} is given twice; expected it once", self.text, key_at)
                self.require(
                    "=", f"after option {key!r}", "layers in parentheses stand apart from the name before them"
                )
                options[key], option_at[key] = self.value(), key_at
                if self.skip_space() == ")":
                    break
                self.require(",", "or ')' after an option's value", "")
            self.at += 1
        return MixerSpec(name, dict(sorted(options.items())), at, option_at)

    def value(self) -> Value:
        if self.skip_space() != "[":
            return self.scalar()
        self.at += 1
        items: list[Scalar] = []
        while self.skip_space() != "]" or items:
            items.append(self.scalar())
            if self.skip_space() == "]":
                break
            self.require(",", "or ']' after an item of a list", "")
        self.at += 1
        return tuple(items)

    def scalar(self) -> Scalar:
        self.skip_space()
        for token, convert in (
            (_NUMBER, self.number),
            (_NAME, lambda word: _WORDS.get(word, word)),
            (_DOUBLE_QUOTED, self.unescaped),
            (_SINGLE_QUOTED, lambda quoted: quoted[1:-1]),
        ):
            if match := token.match(self.text, self.at):
                value = convert(match.group())
                self.at = match.end()
                return value
        self.refuse("a value: a number, true, false, null, a word, a quoted string, or a list such as [1, 2]")

    def number(self, written: str) -> int | float:
        value: int | float = math.inf
        if len(written) <= _MAX_NUMBER:
            value = int(written) if written.lstrip("+-").isdecimal() else float(written)
        if isinstance(value, float) and not math.isfinite(value):
            shown = written if len(written) <= 20 else f"{written[:17]}..."
            problem = f"found {shown}; expected a finite number of at most {_MAX_NUMBER} characters"
            raise PatternError(problem, self.text, self.at)
        return value

    def unescaped(self, quoted: str) -> str:
        try:
            return str(json.loads(quoted, strict=False))
        except json.JSONDecodeError as error:
            problem = f"found an unknown escape ({error.msg}); expected those of JSON, such as \\n or \\u00e9"
            raise PatternError(problem, self.text, self.at) from None

    def name(self, expected: str) -> str:
        match = _NAME.match(self.text, self.at)
        if match is None:
            self.refuse(expected)
        self.at = match.end()
        return match.group()

    def require(self, character: str, where: str, hint: str) -> None:
        if self.skip_space() != character:
            self.refuse(f"{character!r} {where}", hint)
        self.at += 1

    def skip_space(self) -> str:
        """Move to the next character that is no space, and return it."""
        match = _SPACE.match(self.text, self.at)
        assert match is not None  # it matches nothing, too
        self.at = match.end()
        return self.peek()

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def expected_besides(self) -> str:
        """What may stand here, after a unit, besides another."""
        star = "" if self.repeated else ", '*'"
        return f"{star} or ')'" if self.open else f"{star}, '@' or the end"

    def unit_hint(self, character: str) -> str:
        if not character and not self.text.strip():
            return "the pattern is empty"
        if character == "@":
            return "'@' tiles the whole pattern and stands at its end"
        if character == "*" and self.layers:
            return "one repetition for each unit; parentheses make a unit: (gdn*3)*2"
        if character == "=":
            return "options follow their mixer's name without a space: swa(window=4096)"
        if character == ",":
            return "layers are separated by spaces"
        return "a repetition follows what it repeats: gdn*3" if character.isdecimal() else ""

    def refuse(self, expected: str, hint: str = "") -> NoReturn:
        word = _NAME.match(self.text, self.at)
        found = repr(word.group()[:24] if word else self.peek()) if self.at < len(self.text) else "the end"
        problem = f"found {found}; expected {expected}" + (f" ({hint})" if hint else "")
        raise PatternError(problem, self.text, self.at)
