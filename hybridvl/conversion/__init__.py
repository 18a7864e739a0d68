"""One checkpoint turned into a model of another layer pattern, with an account of every weight."""

from hybridvl.conversion.conversion import Conversion, convert, prepare
from hybridvl.conversion.report import Report

__all__ = ["Conversion", "Report", "convert", "prepare"]
