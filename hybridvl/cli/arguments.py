"""An argument parser whose complaints begin with the mistake."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from hybridvl.layers.errors import ConfigError


class Arguments(argparse.ArgumentParser):
    """argparse's parser, with the mistake on the first line of standard error and the usage after it."""

    def error(self, message: str) -> NoReturn:
        """Print the mistake, then the usage, and exit with status 2."""
        print(f"error: {message}", file=sys.stderr)
        self.print_usage(sys.stderr)
        self.exit(2)


def take_flags(arguments: Sequence[str], flag: re.Pattern[str]) -> tuple[list[str], list[tuple[re.Match[str], str]]]:
    """The arguments without the flags that fit a pattern, and those flags with their values.

    flag: fits a whole argument, and has a group "value" for what stands behind an "=". ConfigError for a flag without
    a value.
    """
    rest: list[str] = []
    taken: list[tuple[re.Match[str], str]] = []
    waiting = iter(arguments)
    for argument in waiting:
        match = flag.fullmatch(argument)
        if match is None:
            rest.append(argument)
            continue
        value = match["value"] if match["value"] is not None else next(waiting, None)
        if value is None or (match["value"] is None and value.startswith("--")):
            raise ConfigError(f"{argument}: expected a value after it")
        taken.append((match, value))
    return rest, taken
