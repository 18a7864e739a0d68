"""fla and triton installed where there is no GPU: nothing of ours picks them up, and an explicit choice says why."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

OPERATORS = {"gated_delta_rule", "ssd", "causal_conv", "attention"}

# Runs in an interpreter of its own: other tests of this process may have imported fla through transformers.
PROBE = """
import json, sys
import torch
import hybridvl.layers as layers
from hybridvl.layers import ops

torch.manual_seed(0)
B, T, H, K, V = 2, 7, 2, 16, 32

def draw(*shape):
    return torch.randn(shape, dtype=torch.float32)

CALLS = {
    "gated_delta_rule": lambda backend: ops.gated_delta_rule(*delta, qk_l2norm=True, backend=backend)[0],
    "ssd": lambda backend: ops.ssd(*scan, backend=backend)[0],
    "causal_conv": lambda backend: ops.causal_conv(*conv, backend=backend)[0],
    "attention": lambda backend: ops.attention(*attend, backend=backend),
}
delta = (draw(B, T, H, K), draw(B, T, H, K), draw(B, T, H, V), -draw(B, T, H).abs(), draw(B, T, H).sigmoid())
scan = (draw(B, T, H, K), draw(B, T, H).abs(), -draw(H).abs(), draw(B, T, 1, K), draw(B, T, 1, K))
conv = (draw(B, T, 8), draw(8, 4))
attend = (draw(B, T, H, K), draw(B, T, H, K), draw(B, T, H, K))

found = {"ops": {}, "mixers": {}}
for name, call in CALLS.items():
    expected = call("reference")
    found["ops"][name] = ((call("auto") - expected).abs().max() / expected.abs().max()).item()

for name, config_class in layers.MIXERS.items():
    config = config_class()
    mixer = config.build(64)
    K = config.rotary_dim
    rotary = {K: (torch.ones(1, T, K), torch.zeros(1, T, K))} if K else {}
    x = draw(1, T, 64).requires_grad_()
    y = mixer(x, layers.Sequence(rotary=rotary))
    y.square().mean().backward()
    with torch.no_grad():
        stateful = mixer(x, layers.Sequence(rotary=rotary), mixer.init_state(1))
    found["mixers"][name] = [((stateful - y).abs().max() / y.abs().max()).item(), x.grad.abs().sum().item()]

from hybridvl.testing.operators import check_backends
checks = check_backends("cpu")
told = [check for check in checks if check.error is None or check.chosen]
found["checks"] = {f"{check.op} {check.backend}": check.reason for check in told}
found["wrong"] = [check.op for check in checks if not check.passed]

try:
    CALLS["gated_delta_rule"]("fla")
    found["explicit"] = "no error"
except layers.ConfigError as error:
    found["explicit"] = str(error)
found["imported"] = sorted({name.split(".")[0] for name in sys.modules} & {"fla", "flash_attn"})
print(json.dumps(found))
"""

# Why the choice must go by device: fla's own call, the one that its importability seems to promise.
CONTROL = """
import torch
from fla.ops.gated_delta_rule import chunk_gated_delta_rule
q = k = v = torch.randn(1, 8, 2, 16)
chunk_gated_delta_rule(q, k, v, g=-torch.rand(1, 8, 2), beta=torch.rand(1, 8, 2))
"""


def run_without_gpu(code: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "HYBRIDVL_BACKEND"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def probe() -> dict:
    done = run_without_gpu(PROBE)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("package", ["fla", "triton"])
def test_kernel_packages_are_installed_here(package: str) -> None:
    assert importlib.util.find_spec(package), f"{package} comes with the dev extra; without it this file shows nothing"


def test_fla_would_crash_here() -> None:
    done = run_without_gpu(CONTROL)
    assert done.returncode != 0
    assert "active drivers" in done.stderr


def test_auto_computes_what_the_reference_computes(probe: dict) -> None:
    assert probe["ops"].keys() == OPERATORS
    assert max(probe["ops"].values()) < 2e-5


def test_every_mixer_runs_forward_backward_and_with_a_state(probe: dict) -> None:
    assert probe["mixers"].keys() >= {"full", "swa", "gdn", "mamba2"}
    for difference, gradient in probe["mixers"].values():
        assert difference < 2e-5
        assert gradient > 0


def test_every_operator_falls_back_to_torch(probe: dict) -> None:
    assert probe["wrong"] == []
    for name, reason in probe["checks"].items():
        assert (reason == "") == name.endswith(" torch"), name
        assert not reason or "need CUDA tensors" in reason


def test_fla_is_never_imported(probe: dict) -> None:
    assert probe["imported"] == []


def test_an_explicit_choice_says_why_it_cannot_be(probe: dict) -> None:
    assert "'fla' cannot be used: its Triton kernels need CUDA tensors, these are on 'cpu'" in probe["explicit"]
