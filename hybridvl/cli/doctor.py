"""`hybridvl doctor`: versions, devices, which backend each operator takes and whether it computes the right thing."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from hybridvl.cli.arguments import Arguments
from hybridvl.testing.operators import BackendCheck, check_backends
from hybridvl.training.versions import versions

if TYPE_CHECKING:
    from rich.table import Table


def main(argv: Sequence[str]) -> int:
    """Print the report; returns 1 when a usable backend computes the wrong thing."""
    parser = Arguments(
        prog="hybridvl doctor",
        description="Versions, devices, and for every operator its backends: usable or why not, which one 'auto' "
        "takes, and a short check of its numbers against the float64 reference.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args(argv)
    machine = _machine()
    checks = [check for device in _devices() for check in check_backends(device)]
    if options.json:
        rows = [asdict(check) for check in checks]
        print(json.dumps({"versions": versions(), "machine": machine, "backends": rows}, indent=2))
    else:
        _print(machine, checks)
    return 0 if all(check.passed for check in checks) else 1


def _devices() -> list[str]:
    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]


def _machine() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "system": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def _print(machine: dict[str, Any], checks: Sequence[BackendCheck]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    about = Table("", "", title="versions and machine", show_header=False)
    for name, value in {**versions(), **machine}.items():
        about.add_row(name, ", ".join(value) or "none" if isinstance(value, list) else str(value))
    console.print(about)
    for device in dict.fromkeys(check.device for check in checks):
        console.print(_table([check for check in checks if check.device == device], device))


def _table(checks: Sequence[BackendCheck], device: str) -> Table:
    """The backends of every operator on one device, the one that `auto` takes with a star."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Column, Table

    whole = [Column(name, no_wrap=True) for name in ("operator", "backend", "dtype", "error")]
    title = f"operator backends on {device}; * auto takes it"
    table = Table(*whole, Column("", overflow="fold"), title=title, box=SIMPLE_HEAD, padding=(0, 1))
    before = ""
    for check in checks:
        error = "" if check.error is None else f"{check.error:.1e}"
        verdict = escape(check.reason) if check.passed else f"[bold red]{escape(check.reason) or 'WRONG'}[/]"
        name = f"{check.backend} *" if check.chosen else check.backend
        table.add_row("" if check.op == before else check.op, name, check.dtype or "", error, verdict or "ok")
        before = check.op
    return table
