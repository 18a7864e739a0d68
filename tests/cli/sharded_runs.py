"""Fits by two processes that are started once for all of them, and what they leave."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def two_processes(fits: Sequence[Sequence[str]], timeout: float = 280) -> list[subprocess.CompletedProcess[str]]:
    """Run `hybridvl ...` with each of these arguments, one after the other, in two processes that share the data.

    Every run needs a run.version of its own. Ends at the first one that fails.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    started = [
        subprocess.Popen(
            [sys.executable, __file__, json.dumps([list(fit) for fit in fits])],
            env={**env, "LOCAL_RANK": str(rank)},
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


def _main() -> int:
    from hybridvl.cli import main

    for arguments in json.loads(sys.argv[1]):
        status = main(arguments)
        if status:
            print(f"{arguments}: status {status}", file=sys.stderr)
            return status
    return 0


if __name__ == "__main__":
    sys.exit(_main())
