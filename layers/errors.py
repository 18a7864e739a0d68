"""The exceptions that the command line explains: mistakes in what a user wrote, and runs that cannot go on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class ConfigError(ValueError):
    """A mistake in a user's configuration or input.

    The message names the place (a YAML path, a file), the value found and what is accepted.
    The command line prints it without a traceback and exits with status 2.
    """


class RunError(RuntimeError):
    """A run that cannot go on, although what was asked for can be read: a loss that is no number, no memory left.

    The message says where and what helps. The command line prints it without a traceback and exits with status 3.
    """


@contextlib.contextmanager
def within(place: str) -> Iterator[None]:
    """Put a place before the message of every ConfigError of the block; an empty one changes nothing."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}" if place else str(error)) from error
