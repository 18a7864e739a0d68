"""Layer patterns: one string that says how deep a model is and which mixers its layers are made of."""

from hybridvl.pattern.core import Pattern, parse_pattern
from hybridvl.pattern.errors import PatternError

__all__ = ["Pattern", "PatternError", "parse_pattern"]
