"""The one exception for mistakes in what a user wrote."""


class ConfigError(ValueError):
    """A mistake in a user's configuration or input.

    The message names the place (a YAML path, a file), the value found and what is accepted.
    The command line prints it without a traceback and exits with status 2.
    """
