"""Times the operators' PyTorch paths beside transformers' on the same inputs, interleaved in one process.

    python benchmarks/operators.py --threads 1 --rounds 7 --json docs/benchmarks/operators.json

Every pair is compared first (largest difference relative to the peer's largest output); then
the two take turns, and the table shows medians and the ratio peer / ours with its quartiles.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from hybridvl.layers.ops import gated_delta_rule

Run = Callable[[], Tensor]

SHAPES = {
    "B1 T2048 H16 K128 V128": (1, 2048, 16, 128, 128),
    "B16 T256 H4 K32 V64": (16, 256, 4, 32, 64),
}


def delta_rule_pair(shape: tuple[int, int, int, int, int]) -> tuple[Run, Run, list[Tensor]]:
    """Ours, the peer's, and the leaves whose gradients both fill; float32, unit keys, decays near those of training."""
    batch, tokens, heads, key_dim, value_dim = shape
    torch.manual_seed(0)
    q, k = (F.normalize(torch.randn(batch, tokens, heads, key_dim), dim=-1).requires_grad_() for _ in range(2))
    v = torch.randn(batch, tokens, heads, value_dim, requires_grad=True)
    g = (-F.softplus(torch.randn(batch, tokens, heads))).requires_grad_()
    beta = torch.rand(batch, tokens, heads).requires_grad_()

    def ours() -> Tensor:
        return gated_delta_rule(q, k, v, g, beta, backend="torch")[0]

    def peer() -> Tensor:
        return torch_chunk_gated_delta_rule(q, k, v, g=g, beta=beta)[0]

    return ours, peer, [q, k, v, g, beta]


def measure(ours: Run, peer: Run, leaves: list[Tensor], backward: bool, rounds: int) -> dict[str, float]:
    """Medians in ms, the ratio within each round (median, quartiles), and the largest relative difference."""

    def timed(run: Run) -> float:
        for leaf in leaves:
            leaf.grad = None
        start = time.perf_counter()
        if backward:
            run().sum().backward()
        else:
            with torch.no_grad():
                run()
        return (time.perf_counter() - start) * 1e3

    with torch.no_grad():
        ours_out, peer_out = ours(), peer()
    difference = ((ours_out - peer_out).abs().max() / peer_out.abs().max()).item()
    timed(ours), timed(peer)
    pairs = [(timed(ours), timed(peer)) for _ in range(rounds)]
    low, middle, high = statistics.quantiles([b / a for a, b in pairs], n=4)
    return {
        "ours_ms": statistics.median(a for a, _ in pairs),
        "peer_ms": statistics.median(b for _, b in pairs),
        "ratio": middle,
        "ratio_low": low,
        "ratio_high": high,
        "difference": difference,
    }


def main() -> None:
    """Measure every pair, print the table, write the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of each pair (default: 7)")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = Table(title="gated delta rule, float32: transformers' chunk path / ours")
    for column in ("shape", "pass", "ours ms", "peer ms", "ratio (quartiles)", "difference"):
        table.add_column(column)
    results = []
    for name, shape in SHAPES.items():
        ours, peer, leaves = delta_rule_pair(shape)
        for backward in (False, True):
            label = "forward + backward" if backward else "forward"
            found = measure(ours, peer, leaves, backward, options.rounds)
            results.append({"shape": name, "pass": label, **found})
            ratio = f"{found['ratio']:.2f} ({found['ratio_low']:.2f} to {found['ratio_high']:.2f})"
            table.add_row(
                name, label, f"{found['ours_ms']:.1f}", f"{found['peer_ms']:.1f}", ratio, f"{found['difference']:.1e}"
            )
    Console().print(table)
    if options.json is not None:
        machine = {"torch": torch.__version__, "transformers": transformers.__version__, "machine": platform.machine()}
        report = {**machine, "threads": options.threads, "rounds": options.rounds, "results": results}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
