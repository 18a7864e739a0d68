"""The command line: a thin dispatcher, so that `hybridvl --help` imports no framework."""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from hybridvl import __version__

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
    "pipeline": _Command("hybridvl.cli.pipeline", (), "run the stages of a pipeline, skipping what is done"),
    "report": _Command("hybridvl.cli.report", (), "compare runs: means over seeds with intervals, differences, costs"),
    "compare": _Command("hybridvl.cli.compare", (), "settings and metrics of runs, side by side"),
    "sweep": _Command("hybridvl.cli.sweep", (), "run a study: a recipe along axes, every cell with every seed"),
    "generate": _Command("hybridvl.cli.generate", (), "reply to prompts about images and videos"),
    "stream": _Command("hybridvl.cli.stream", (), "show an endless video to a model and ask about it at any moment"),
    "serve": _Command("hybridvl.cli.serve", (), "a stream on a page: live rates, memory, and a box for questions"),
    "place": _Command("hybridvl.cli.place", (), "choose the layers of a teacher that keep attention"),
    "convert": _Command("hybridvl.cli.convert", (), "turn a checkpoint into a model of another layer pattern"),
    "export": _Command("hybridvl.cli.export", (), "turn a checkpoint of a run, sharded or not, into a model folder"),
    "plan": _Command("hybridvl.cli.plan", (), "parameters, FLOPs and state bytes of layer patterns, side by side"),
    "bench": _Command("hybridvl.cli.bench", (), "operators and models timed in turns with peers, results compared"),
    "doctor": _Command("hybridvl.cli.doctor", (), "versions, devices, and which operator backends are used"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a failed check, 2 for a mistake in what was asked, 3 for a run
    that could not go on."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"hybridvl {__version__}")
        return 0
    name = arguments[0]
    if name not in _COMMANDS:
        near = difflib.get_close_matches(name, _COMMANDS, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        return _refuse(f"unknown command {name!r}{hint} (known: {', '.join(_COMMANDS)})")
    try:
        return _run(_COMMANDS[name], arguments[1:])
    except KeyboardInterrupt:
        return _refuse(f"{name} interrupted", status=130)
    except BrokenPipeError:
        # The reader has gone (`hybridvl plan | head`); keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(command: _Command, arguments: list[str]) -> int:
    from hybridvl.layers.errors import ConfigError, RunError

    try:
        result = importlib.import_module(command.module).main([*command.leading, *arguments])
    except SystemExit as done:  # a parser that has printed its help or an error
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except ConfigError as error:
        return _refuse(str(error))
    except RunError as error:
        return _refuse(str(error), status=3)
    except OSError as error:
        if error.errno in _FULL:
            return _refuse(f"cannot write{_place(error)}: {error.strerror}")
        if error.errno in _FORBIDDEN:
            return _refuse(f"no permission{_place(error)}: {error.strerror}")
        raise
    return int(result)


def _refuse(message: str, status: int = 2) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status


def _place(error: OSError) -> str:
    return f" {error.filename}" if error.filename else ""


def _help() -> str:
    width = max(len(name) for name in _COMMANDS) + 2
    listing = "\n".join(f"  {name:{width}}{command.help}" for name, command in _COMMANDS.items())
    return (
        "usage: hybridvl COMMAND [ARGUMENTS]\n\n"
        "Hybrid-attention ablations on vision-language models.\n\n"
        f"commands:\n{listing}\n\n"
        "options:\n  -h, --help   this text\n  --version    the version\n\n"
        "'hybridvl COMMAND --help' explains a command."
    )
