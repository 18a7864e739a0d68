"""An argument parser whose complaints begin with the mistake."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn


class Arguments(argparse.ArgumentParser):
    """argparse's parser, with the mistake on the first line of standard error and the usage after it."""

    def error(self, message: str) -> NoReturn:
        """Print the mistake, then the usage, and exit with status 2."""
        print(f"error: {message}", file=sys.stderr)
        self.print_usage(sys.stderr)
        self.exit(2)
