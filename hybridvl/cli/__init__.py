"""The command line: a thin dispatcher, so that `hybridvl --help` imports no framework."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


class _Command(NamedTuple):
    module: str  # has main(argv) -> exit status
    leading: tuple[str, ...]  # arguments put before the user's
    help: str


_COMMANDS = {
    "fit": _Command("hybridvl.cli.training", ("fit",), "train from a recipe, then test; write a run folder"),
    "validate": _Command("hybridvl.cli.training", ("validate",), "teacher-forced accuracy of a checkpoint"),
    "test": _Command("hybridvl.cli.training", ("test",), "score generated replies of a checkpoint"),
    "predict": _Command("hybridvl.cli.training", ("predict",), "write the replies of a checkpoint to a file"),
    "generate": _Command("hybridvl.cli.generate", (), "answer a prompt about images with a trained model"),
    "plan": _Command("hybridvl.cli.plan", (), "parameters, FLOPs and state bytes of layer patterns, side by side"),
    "doctor": _Command("hybridvl.cli.doctor", (), "versions, devices, and which operator backends are used"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a failed check, or 2 for a mistake in what was asked."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    chosen = parser.parse_args(arguments[:1])
    command = _COMMANDS[chosen.command]
    try:
        return _run(command, arguments[1:])
    except KeyboardInterrupt:
        print(f"hybridvl {chosen.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has gone (`hybridvl plan | head`); keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(command: _Command, arguments: list[str]) -> int:
    from hybridvl.layers.errors import ConfigError

    try:
        result = importlib.import_module(command.module).main([*command.leading, *arguments])
    except ConfigError as error:
        return _refuse(str(error))
    except OSError as error:
        if error.errno in _FULL:
            return _refuse(f"cannot write{_place(error)}: {error.strerror}")
        if error.errno in _FORBIDDEN:
            return _refuse(f"no permission{_place(error)}: {error.strerror}")
        raise
    return int(result)


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _place(error: OSError) -> str:
    return f" {error.filename}" if error.filename else ""


def _parser() -> argparse.ArgumentParser:
    width = max(len(name) for name in _COMMANDS) + 2
    listing = "\n".join(f"  {name:{width}}{command.help}" for name, command in _COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="hybridvl",
        description="Hybrid-attention ablations on vision-language models.",
        epilog=f"commands:\n{listing}\n\n'hybridvl COMMAND --help' explains a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hybridvl {_version()}")
    parser.add_argument("command", choices=list(_COMMANDS), metavar="COMMAND", help="what to do, see below")
    return parser


def _version() -> str:
    from hybridvl import __version__

    return __version__
