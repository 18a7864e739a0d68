"""`hybridvl doctor`: versions, devices, which backend each operator takes and whether it computes the right thing."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridvl.cli.arguments import Arguments
from hybridvl.layers.ops import attention, causal_conv, gated_delta_rule, ssd
from hybridvl.layers.ops.backend import BackendChoice, backends_report
from hybridvl.training.versions import versions

TOLERANCE = 1e-2
"""Largest error relative to the largest value; a wrong kernel is off by far more, TF32 on a GPU by less."""


@dataclass(frozen=True)
class Check:
    """A backend of an operator on a device.

    error: largest difference from the float64 reference relative to its largest value; None when it cannot run.
    """

    device: str
    op: str
    backend: str
    chosen: bool
    reason: str
    error: float | None

    @property
    def passed(self) -> bool:
        """Whether it computes the right thing, or does not run."""
        return self.error is None or self.error < TOLERANCE


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
        rows = [{**asdict(check), "passed": check.passed} for check in checks]
        print(json.dumps({"versions": versions(), "machine": machine, "backends": rows}, indent=2))
    else:
        _print(machine, checks)
    return 0 if all(check.passed for check in checks) else 1


def check_backends(device: str) -> list[Check]:
    """Every backend of every operator on a device, run where it can run."""
    return [_check(choice, device) for choice in backends_report(device)]


def _check(choice: BackendChoice, device: str) -> Check:
    error = None
    if choice.usable:
        right = _run(choice.op, "reference", device, torch.float64)
        found = _run(choice.op, choice.backend, device, torch.float32)
        error = float((found.double() - right).abs().max() / right.abs().max())
    return Check(device, choice.op, choice.backend, choice.chosen, choice.reason, error)


def _run(op: str, backend: str, device: str, dtype: torch.dtype) -> Tensor:
    """The operator's output on a small fixed input of a ragged length."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    rows, time, heads, dim = 2, 75, 2, 64
    q, k, v = draw(rows, time, heads, dim), draw(rows, time, heads, dim), draw(rows, time, heads, dim)
    decay, gate = draw(rows, time, heads), draw(rows, time, heads)
    runs: dict[str, Callable[[], Any]] = {
        "attention": lambda: attention(q, k, v, window=16, backend=backend),
        "gated_delta_rule": lambda: gated_delta_rule(
            q, k, v, F.logsigmoid(decay), gate.sigmoid(), qk_l2norm=True, backend=backend
        )[0],
        "ssd": lambda: ssd(v, F.softplus(decay), -gate[0, 0].exp(), k, q, backend=backend)[0],
        "causal_conv": lambda: causal_conv(v.flatten(2), draw(heads * dim, 4), backend=backend)[0],
    }
    result: Tensor = runs[op]()
    return result


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


def _print(machine: dict[str, Any], checks: Sequence[Check]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    about = Table("", "", title="versions and machine", show_header=False)
    for name, value in {**versions(), **machine}.items():
        about.add_row(name, ", ".join(value) or "none" if isinstance(value, list) else str(value))
    console.print(about)
    table = Table("device", "operator", "backend", "auto", "error", "", title="operator backends")
    for check in checks:
        error = "" if check.error is None else f"{check.error:.1e}"
        verdict = check.reason or ("ok" if check.passed else "[bold red]WRONG[/]")
        table.add_row(check.device, check.op, check.backend, "*" if check.chosen else "", error, verdict)
    console.print(table)
