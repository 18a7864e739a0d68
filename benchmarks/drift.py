"""Streams 100,000 tokens through a Gated DeltaNet layer with bfloat16 weights, and measures what its state has lost.

    OMP_NUM_THREADS=1 python benchmarks/drift.py --json docs/benchmarks/drift.json

The layer takes frames of 64 tokens with its state carried on, as a stream does. What it feeds its recurrence is
recorded, and replayed token by token in float64. Told is how far the layer's outputs are from the replay's, as the norm
of the difference over the norm of the replay, in blocks over the stream: with the layer's own float32 state; and, for
comparison, with the same recurrence whose state is rounded to bfloat16 after every frame, or after every token. All
outputs are bfloat16, as the layer's are, which alone is an error of about 0.0017.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import hybridvl.layers.gdn as gdn
from hybridvl.bench.machine import describe
from hybridvl.layers import Sequence as Tokens

_FRAME = 64
_BLOCKS = 20
_EPS = 1e-6  # of the unit length of queries and keys


def main(arguments: Sequence[str]) -> int:
    """Measure, print, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000, help="of the stream")
    parser.add_argument("--heads", type=int, default=4, help="of the layer")
    parser.add_argument("--head-dim", type=int, default=32, help="of keys; values have as many")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs")
    parser.add_argument("--json", type=Path, help="where to write the results")
    chosen = parser.parse_args(arguments)
    found = drift(chosen.tokens, chosen.heads, chosen.head_dim, chosen.seed)
    for name, errors in found.items():
        print(f"{name:24} first block {errors[0]:.1e}, largest {max(errors):.1e}, last {errors[-1]:.1e}")
    if chosen.json is not None:
        settings = {"tokens": chosen.tokens, "heads": chosen.heads, "head_dim": chosen.head_dim, "seed": chosen.seed}
        report = {**describe("cpu"), "settings": settings, "relative_errors": found}
        chosen.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


@torch.no_grad()
def drift(tokens: int, heads: int, head_dim: int, seed: int) -> dict[str, list[float]]:
    """Relative errors of the outputs in each of 20 blocks of the stream, by the kind of state."""
    torch.manual_seed(seed)
    width = heads * head_dim
    layer = gdn.GatedDeltaNetConfig(heads=heads, head_dim=head_dim, expand_v=1.0).build(width).bfloat16().eval()
    state = layer.init_state(1, dtype=torch.bfloat16)
    exact = torch.zeros(heads, head_dim, head_dim, dtype=torch.float64)
    rounded = {"bf16 after every frame": exact.float(), "bf16 after every token": exact.float()}
    sums: dict[str, list[list[float]]] = {name: [] for name in ("float32 state", *rounded)}
    frames = -(-tokens // _FRAME)
    for _ in range(frames):
        calls: list[tuple[Any, ...]] = []
        with patch.object(gdn, "gated_delta_rule", recorder(calls)):
            layer(torch.randn(1, _FRAME, width).bfloat16(), Tokens(), state)
        ((inputs, output),) = calls
        wanted, exact = replay(inputs, exact)
        outputs = {"float32 state": output[0].double()}
        for name, per_token in (("bf16 after every frame", False), ("bf16 after every token", True)):
            found, after = replay(inputs, rounded[name], per_token)
            outputs[name], rounded[name] = found.bfloat16().double(), after.bfloat16().float()
        for name, found in outputs.items():
            sums[name].append([float((found - wanted).square().sum()), float(wanted.square().sum())])
    each = -(-frames // _BLOCKS)
    blocks = {name: torch.tensor(rows).split(each) for name, rows in sums.items()}
    return {name: [float((b[:, 0].sum() / b[:, 1].sum()).sqrt()) for b in parts] for name, parts in blocks.items()}


def recorder(calls: list[tuple[Any, ...]]) -> Any:
    """The layer's recurrence, whose inputs and outputs are kept."""
    rule = gdn.gated_delta_rule

    def recorded(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        output, final = rule(q, k, v, g, beta, **options)
        calls.append(((q, k, v, g, beta), output))
        return output, final

    return recorded


def replay(inputs: Sequence[Tensor], state: Tensor, round_each: bool = False) -> tuple[Tensor, Tensor]:
    """S = e^g S; S += k (beta (v - k^T S))^T; o = q^T S in the state's dtype, for the tokens of one row.

    inputs: q, k, v (1, T, H, K), log decays g and rates beta (1, T, H). state: (H, K, V). round_each: to bfloat16 after
    every token. Returns the outputs (T, H, V) float64 and the state after them.
    """
    q, k, v, g, beta = (tensor[0].to(state.dtype) for tensor in inputs)
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _EPS) for x in (q, k))
    q = q * q.shape[-1] ** -0.5
    outputs = []
    for t in range(len(q)):
        state = state * g[t].exp()[:, None, None]
        error = beta[t][:, None] * (v[t] - torch.einsum("hk,hkv->hv", k[t], state))
        state = state + torch.einsum("hk,hv->hkv", k[t], error)
        if round_each:
            state = state.bfloat16().to(q.dtype)
        outputs.append(torch.einsum("hk,hkv->hv", q[t], state))
    return torch.stack(outputs).double(), state


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
