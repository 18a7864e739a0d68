"""benchmarks/drift.py: its replay is the recurrence, and rounded states show in what it tells."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from scripts import load_script

from hybridvl.layers.ops import gated_delta_rule


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("drift")


def test_the_replay_is_the_recurrence(script: ModuleType) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 40, 2, 8, dtype=torch.float64)
    g, beta = -torch.rand(1, 40, 2, dtype=torch.float64), torch.rand(1, 40, 2, dtype=torch.float64)
    start = torch.randn(2, 8, 8, dtype=torch.float64)
    wanted, final = gated_delta_rule(q, k, v, g, beta, start[None], qk_l2norm=True, backend="reference")
    found, state = script.replay((q, k, v, g, beta), start)
    torch.testing.assert_close(found, wanted[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(state, final[0], atol=1e-12, rtol=0)


def test_what_is_rounded_away_is_told(script: ModuleType) -> None:
    found = script.drift(tokens=640, heads=2, head_dim=16, seed=0)
    assert {name: len(errors) for name, errors in found.items()} == dict.fromkeys(found, 10)
    own, frames, tokens = (errors[-1] for errors in found.values())
    assert 1e-3 < own < 3e-3  # the rounding of bfloat16 outputs
    assert own < frames < tokens
