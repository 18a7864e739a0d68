"""Numbers for people: three digits and a prefix."""

from __future__ import annotations

_DECIMAL = ("", "k", "M", "G", "T", "P", "E")
_SHORT_SCALE = ("", "K", "M", "B", "T")


def with_prefix(value: float, unit: str) -> str:
    """1234567, "B" -> "1.23 MB"; powers of 1000."""
    number, prefix = _scaled(value, _DECIMAL)
    return f"{number} {prefix}{unit}".rstrip()


def parameters(count: float) -> str:
    """4408381536 -> "4.41B", as sizes of models are written."""
    return "".join(_scaled(count, _SHORT_SCALE))


def tokens(count: int) -> str:
    """1024 -> "1K", 65536 -> "64K", 1000 -> "1,000": multiples of 1024 as such."""
    return f"{count // 1024:,}K" if count and count % 1024 == 0 else f"{count:,}"


def _scaled(value: float, prefixes: tuple[str, ...]) -> tuple[str, str]:
    """Up to three digits of a number that is not negative, and the prefix of its power of 1000."""
    size = 0
    while value >= 999.5 and size < len(prefixes) - 1:
        value /= 1000
        size += 1
    return f"{value:.3g}", prefixes[size]
