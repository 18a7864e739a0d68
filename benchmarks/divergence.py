"""Measures the chunked divergences beside the same through full logits: memory, time, and how far they are apart.

    python benchmarks/divergence.py --json docs/benchmarks/divergence-cpu.json

Every run computes the value and the gradients of the student's hidden states and output head. The sides take turns,
and each run is measured for time and for the memory that it takes at most beside its results. The full-logits side
is what one would write: log_softmax of both models' logits and kl_div, the teacher's without a graph. Ends with status
1 where the numbers differ by more than 1e-4.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridvl.bench.machine import describe, usable_device
from hybridvl.bench.memory import Peak, peak_memory
from hybridvl.bench.sides import Results
from hybridvl.training.losses.divergences import DIVERGENCES, linear_divergence

_FURTHEST = 1e-4  # relative, by norm
_GOALS = {"memory": 0.1, "time": 1.3}
_RATIOS = (*_GOALS, "processor")
_SIZES = "tokens", "width", "vocabulary", "dtype", "temperature", "token_chunk", "vocab_chunk"


@dataclass(frozen=True)
class Inputs:
    """Hidden states (N, D) and heads (V, D); gradients are the student's, unless frozen the head's too."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor

    @classmethod
    def draw(cls, tokens: int, width: int, vocabulary: int, device: str, dtype: torch.dtype, frozen: bool) -> Inputs:
        """A teacher with logits of about 3, and a student near it."""
        generator = torch.Generator().manual_seed(0)
        hidden, weight = (torch.randn(size, width, generator=generator) for size in (tokens, vocabulary))
        hidden, weight = hidden.to(device), weight.to(device).mul_(3 / math.sqrt(width))
        student = [x + 0.3 * x.std() * torch.randn(x.shape, generator=generator).to(device) for x in (hidden, weight)]
        leaves = [x.to(dtype).requires_grad_(asks) for x, asks in zip(student, (True, not frozen), strict=True)]
        return cls(leaves[0], leaves[1], hidden.to(dtype), weight.to(dtype))

    def gradients(self, value: Tensor) -> Results:
        """The value and the gradients, as results."""
        asked = {name: getattr(self, name) for name in ("student_hidden", "student_weight")}
        asked = {name: tensor for name, tensor in asked.items() if tensor.requires_grad}
        return {
            "value": value.detach(),
            **dict(zip(asked, torch.autograd.grad(value, list(asked.values())), strict=True)),
        }


def ours(
    inputs: Inputs, kind: str, temperature: float, token_chunk: int | None = None, vocab_chunk: int | None = None
) -> Results:
    """Chunked."""
    four = inputs.student_hidden, inputs.student_weight, inputs.teacher_hidden, inputs.teacher_weight
    return inputs.gradients(linear_divergence(*four, kind, temperature, token_chunk, vocab_chunk))


def full_logits(inputs: Inputs, kind: str, temperature: float) -> Results:
    """All at once."""
    with torch.no_grad():
        log_p = _log_probabilities(inputs.teacher_hidden, inputs.teacher_weight, temperature)
    log_q = _log_probabilities(inputs.student_hidden, inputs.student_weight, temperature)
    if kind == "forward":
        value = _kl(log_p, log_q)
    elif kind == "reverse":
        value = _kl(log_q, log_p)
    else:
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        value = (_kl(log_p, log_m) + _kl(log_q, log_m)) / 2
    del log_p, log_q
    return inputs.gradients(value * temperature**2)


def _log_probabilities(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    return F.log_softmax((hidden @ weight.T).float() / temperature, -1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def measure(kind: str, frozen: bool, options: argparse.Namespace) -> dict[str, Any]:
    """One kind of divergence, with or without a gradient of the head."""
    dtype = getattr(torch, options.dtype)
    inputs = Inputs.draw(options.tokens, options.width, options.vocabulary, options.device, dtype, frozen)
    sides: dict[str, Callable[[], Results]] = {
        "ours": partial(ours, inputs, kind, options.temperature, options.token_chunk, options.vocab_chunk),
        "full_logits": partial(full_logits, inputs, kind, options.temperature),
    }
    few = Inputs.draw(64, options.width, options.vocabulary, options.device, dtype, frozen)
    full_logits(few, kind, options.temperature)  # what is set up once is set up
    ours(few, kind, options.temperature)
    del few
    runs: dict[str, list[_Run]] = {name: [] for name in sides}
    for number in range(options.rounds):
        for name in sorted(sides, reverse=bool(number % 2)):
            runs[name].append(_run(sides[name], options.device))
            print(f"{kind}, {name}: {runs[name][-1].seconds:.1f} s, {runs[name][-1].peak}", file=sys.stderr)
        errors = _errors(runs["ours"][-1].results, runs["full_logits"][-1].results)
        for found in runs.values():
            found[-1].results.clear()
    record: dict[str, Any] = {
        "kind": kind,
        "head": "frozen" if frozen else "trained",
        **{name: getattr(options, name) for name in _SIZES},
        "relative_errors": errors,
    }
    for name, found in runs.items():
        record[name] = {
            "seconds": [run.seconds for run in found],
            "processor_seconds": [run.processor_seconds for run in found],
            "memory": [_bytes(run.peak) for run in found],
        }
    pairs = list(zip(runs["ours"], runs["full_logits"], strict=True))
    record["time_ratio"] = statistics.median(a.seconds / b.seconds for a, b in pairs)
    record["processor_ratio"] = statistics.median(a.processor_seconds / b.processor_seconds for a, b in pairs)
    if all(run.peak for run in runs["ours"] + runs["full_logits"]):
        record["memory_ratio"] = statistics.median(_scratch(a.peak) / _scratch(b.peak) for a, b in pairs)
    return record


@dataclass(frozen=True)
class _Run:
    seconds: float
    processor_seconds: float  # of all threads, the system's work for the process included
    peak: Peak | None
    results: Results


def _run(work: Callable[[], Results], device: str) -> _Run:
    kept: list[tuple[float, float, Results]] = []

    def timed() -> Results:
        start, used = time.perf_counter(), time.process_time()
        results = work()
        if device != "cpu":
            torch.cuda.synchronize(device)
        kept.append((time.perf_counter() - start, time.process_time() - used, results))
        return results

    peak = peak_memory(timed, device)
    if not kept:  # memory cannot be measured here
        timed()
    seconds, processor_seconds, results = kept[0]
    return _Run(seconds, processor_seconds, peak, results)


def _errors(found: Results, right: Results) -> dict[str, float]:
    return {name: float((found[name] - right[name]).norm() / right[name].norm()) for name in right}


def _bytes(peak: Peak | None) -> dict[str, int] | None:
    return None if peak is None else asdict(peak)


def _scratch(peak: Peak | None) -> int:
    return 0 if peak is None else max(1, peak.scratch)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; the exit status."""
    options = _parse(arguments)
    usable_device(options.device)
    found: list[dict[str, Any]] = []
    report: dict[str, Any] = {
        "machine": describe(options.device),
        "goals": _GOALS,
        "memory": "bytes: peak is what a run took at most, scratch is that less its results; ratios are of scratch",
        "measurements": found,
    }
    if options.append and options.json.exists():
        before = json.loads(options.json.read_text())
        if before["machine"] != report["machine"]:
            print(f"divergence: {options.json} was measured on another machine or day", file=sys.stderr)
            return 2
        found += before["measurements"]
    for kind in options.kinds:
        for head in options.heads:
            record = measure(kind, head == "frozen", options)
            found.append(record)
            ratios = (f"{name} {record[f'{name}_ratio']:.3f}" for name in _RATIOS if f"{name}_ratio" in record)
            print(f"{kind}, {head} head: ours / full logits: {', '.join(ratios)}; errors {record['relative_errors']}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    errors = [error for record in found for error in record["relative_errors"].values()]
    return 0 if max(errors) <= _FURTHEST or options.dtype != "float32" else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the results, with hardware, versions and date")
    parser.add_argument("--append", action="store_true", help="add to what the file holds already")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--token-chunk", type=int, help="default: as suits the device")
    parser.add_argument("--vocab-chunk", type=int, help="default: as suits the device")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each side")
    parser.add_argument("--kinds", nargs="+", default=["forward"], choices=DIVERGENCES)
    parser.add_argument("--heads", nargs="+", default=["trained"], choices=("trained", "frozen"))
    options = parser.parse_args(arguments)
    if options.append and options.json is None:
        parser.error("--append needs --json, the file to add to")
    return options


if __name__ == "__main__":
    sys.exit(main())
