"""Checks and times the GPU paths: numbers against float64 first, then times beside other kernels, then whole models.

    python benchmarks/gpu_check.py --json docs/benchmarks/gpu-h200.json
    python benchmarks/gpu_check.py --kernels-only
    python benchmarks/gpu_check.py --cpu-dry-run

Every path is compared with float64 on the same inputs before anything is timed; a wrong one ends the run with status 1,
and so does one of our kernels that is slower than a peer's for the same work. Of streams, steps replayed from CUDA
graphs are compared with steps by themselves while a window becomes full and begins anew, then timed beside their goals,
which are said to be met or not met. Times are medians by CUDA events after a
warm-up, the sides taking turns; launches that are shorter than what starts them run in CUDA graphs. Without a CUDA
device it ends at once with status 2; --cpu-dry-run runs everything at tiny sizes on a CPU, our Triton kernels in
Triton's interpreter where Triton is installed, to try the script itself: its times mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if "--cpu-dry-run" in sys.argv and importlib.util.find_spec("triton"):
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

import torch
from gpu_kernels import Case, Run, Sizes, cases
from gpu_models import Clock, ModelSizes, captured, measure_models, measured_model
from gpu_streams import StreamSizes, measure_streams
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hybridvl.bench.machine import describe, measure_limits
from hybridvl.bench.sides import Side
from hybridvl.bench.timing import interleave, timer
from hybridvl.layers import ConfigError
from hybridvl.testing.operators import check_backends, kernel_errors

_SLOWER = 1.05  # than a peer, beyond which ours fails: two runs of the same kernel differ by less


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; the exit status."""
    options = _parse(arguments)
    device = "cpu" if options.cpu_dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("gpu_check: no CUDA device here; --cpu-dry-run tries the script on a CPU", file=sys.stderr)
        return 2
    dry, dtype = options.cpu_dry_run, torch.bfloat16
    checks = [asdict(check) for check in check_backends(device)]
    wrong = [f"{check['op']} ({check['backend']})" for check in checks if not check["passed"]]
    report: dict[str, Any] = {"dry_run": dry, "machine": describe(device), "checks": checks, "cases": [], "models": []}
    for case in cases(Sizes.tiny() if dry else Sizes(), device, dtype):
        record = check_case(case)
        report["cases"].append(record)
        wrong += [f"{case.name}: {side}" for side, found in record["sides"].items() if found["correct"] is False]
        if not wrong:
            time_case(case, record, device, 1 if dry else options.rounds)
    slow = [] if dry else [line for record in report["cases"] for line in record.get("slower", [])]
    if not wrong and not options.kernels_only:
        limits = measure_limits(dtype, device)
        report["limits"] = asdict(limits)
        sizes = ModelSizes.tiny() if dry else ModelSizes.infinitevl()
        streams = StreamSizes.tiny() if dry else StreamSizes()
        model, clock = measured_model(sizes, device, dtype), Clock(device, 1 if dry else options.rounds)
        report["streams"] = measure_streams(model, sizes, streams, device, clock)
        wrong += report["streams"]["wrong"]
        if not wrong:
            report["models"] = measure_models(model, sizes, clock, limits.matmul_flops)
    report |= {"wrong": wrong, "slower_than_peers": slow}
    show(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if wrong or slow else 0


def check_case(case: Case) -> dict[str, Any]:
    """Which sides can run, and how far each is from float64: by norm, over all outputs and gradients."""
    case.reset()
    right = None if case.right is None else case.right()
    sides: dict[str, dict[str, Any]] = {}
    for name, run in case.runs.items():
        case.reset()
        try:
            found = run()
        except (ConfigError, *kernel_errors()) as error:
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            sides[name] = {"correct": False if _ours_is_broken(name, error) else None, "reason": reason}
            continue
        sides[name] = {"correct": True}
        if right is None or name in case.other:
            continue
        worst = max(_error(x, y) for x, y in zip(found, right, strict=True))
        sides[name] |= {"error": worst, "correct": worst < case.tolerance}
    return {"case": case.name, "other_work": case.other, "sides": sides}


def _ours_is_broken(name: str, error: Exception) -> bool:
    """A ConfigError says that a backend cannot run here; anything else that ours raises is a failure."""
    return name.startswith("ours") and not isinstance(error, ConfigError)


def _error(found: Tensor, right: Tensor) -> float:
    found, right = found.detach().double(), right.detach().double()
    error = float((found - right).norm() / right.norm())
    return error if math.isfinite(error) else math.inf


def time_case(case: Case, record: dict[str, Any], device: str, rounds: int) -> None:
    """Medians of the sides that run, into the record; ours beside its peers."""
    case.reset()
    sides = []
    for name, run in case.runs.items():
        if record["sides"][name]["correct"]:
            work, how = captured(_many(run)) if case.graph and device == "cuda" else (run, "eager")
            record["sides"][name] |= {"how": how, "launches": 20 if how == "CUDA graph" else 1}
            sides.append(Side(name, _results(work)))
    for name, seconds in interleave(sides, rounds, min(rounds, 3), timer(device)).items():
        found = record["sides"][name]
        if found["how"].startswith("eager, no"):
            found["launches"] = 20
        median = statistics.median(seconds) / found["launches"]
        found |= {"median_s": median, "least_s": min(seconds) / found["launches"]}
        if case.nbytes:
            found["bytes_per_s"] = case.nbytes / median
    ours = record["sides"][next(iter(case.runs))]
    for peer in case.peers:
        found = record["sides"][peer]
        if "median_s" in ours and "median_s" in found:
            ours.setdefault("peer_over_ours", {})[peer] = found["median_s"] / ours["median_s"]
            if ours["median_s"] > _SLOWER * found["median_s"]:
                record.setdefault("slower", []).append(f"{case.name}: slower than {peer}")


def _many(run: Run) -> Run:
    """Twenty in a row, so that a graph's own launch does not count."""

    def runs() -> list[Tensor]:
        for _ in range(20):
            result = run()
        return result

    return runs


def _results(work: Any) -> Any:
    def run() -> dict[str, Tensor]:
        work()
        return {}

    return run


def show(report: dict[str, Any]) -> None:
    """Two tables."""
    console = Console()
    table = Table("work", "side", "median", "GB/s", "peer / ours", "error", "", title="operators")
    for record in report["cases"]:
        for name, found in record["sides"].items():
            ratios = ", ".join(f"{ratio:.2f}" for ratio in found.get("peer_over_ours", {}).values())
            verdict = found.get("reason") or ("ok" if found["correct"] else "WRONG")
            table.add_row(
                record["case"], name, _time(found.get("median_s")), _number(found.get("bytes_per_s"), 1e-9), ratios,
                "" if "error" not in found else f"{found['error']:.1e}", verdict,
            )  # fmt: skip
    console.print(table)
    streams = report.get("streams", {"records": [], "goals": []})
    if report["models"]:
        table = Table("figure", "median, of frames mean", "more", title="models of random weights")
        for record in [*streams["records"], *report["models"]]:
            more = {name: f"{value:.3g}" for name, value in record.items() if name in ("frames_per_s", "utilisation")}
            if "how" in record:
                more["by"] = record["how"]
            if "bytes_per_s" in record:
                more["GB/s"] = _number(record["bytes_per_s"], 1e-9)
            seconds = record.get("median_s", record.get("mean_s"))
            table.add_row(record["figure"], _time(seconds), ", ".join(f"{k} {v}" for k, v in more.items()))
        console.print(table)
    for goal in streams["goals"]:
        verdict = "no verdict, a dry run" if report["dry_run"] else "met" if goal["met"] else "NOT met"
        console.print(f"goal: {goal['goal']}: {goal['value']:.4g}, wanted {goal['wanted']}: {verdict}")
    for kind in ("wrong", "slower_than_peers"):
        for line in report[kind]:
            console.print(f"{kind.replace('_', ' ')}: {line}", style="bold red")


def _time(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3f} ms"


def _number(value: float | None, scale: float) -> str:
    return "" if value is None else f"{value * scale:.3g}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the results, with hardware, versions and date")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of each side")
    parser.add_argument("--kernels-only", action="store_true", help="leave out the models")
    parser.add_argument("--cpu-dry-run", action="store_true", help="try the script at tiny sizes on a CPU")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
