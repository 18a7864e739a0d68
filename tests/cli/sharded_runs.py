"""Fits by two processes, as a launcher would start them, and what they leave."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence

# `hybridvl ...`, which must have ended the threads between processes: they have aborted interpreters that ended first.
_PROGRAM = """
import sys
from torch import distributed
from hybridvl.cli import main
status = main(sys.argv[1:])
assert status or not distributed.is_initialized()
sys.exit(status)
"""


def two_processes(fits: Sequence[Sequence[str]], timeout: float = 280) -> list[subprocess.CompletedProcess[str]]:
    """Run `hybridvl ...` with each of these arguments, one after the other, in two processes that share the data.

    Every run needs a run.version of its own. Ends at the first one that fails. Returns what each process printed in all
    runs, and its last exit status.
    """
    done: list[subprocess.CompletedProcess[str]] = []
    for fit in fits:
        ended = _both(fit, timeout)
        before = done or [subprocess.CompletedProcess(now.args, 0, "", "") for now in ended]
        done = [
            subprocess.CompletedProcess(now.args, now.returncode, old.stdout + now.stdout, old.stderr + now.stderr)
            for old, now in zip(before, ended, strict=True)
        ]
        if any(process.returncode for process in ended):
            break
    return done


def _both(fit: Sequence[str], timeout: float) -> list[subprocess.CompletedProcess[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *fit],
            env={**env, "LOCAL_RANK": str(rank), "PYTHONFAULTHANDLER": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    done = []
    try:
        for process in started:
            out, error = process.communicate(timeout=timeout)
            done.append(subprocess.CompletedProcess(process.args, process.returncode, out, error))
    finally:
        for process in started:
            process.kill()
    return done
