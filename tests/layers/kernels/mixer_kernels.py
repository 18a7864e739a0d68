"""Triton kernels where they are used: behind the operators, and in mixers that read a chunk and then single tokens."""

from __future__ import annotations

import pytest
import torch
from kernel_support import assert_near, poisoned
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from hybridvl.layers import MIXERS, Sequence
from hybridvl.testing.operators import check_backends

OPTIONS = {
    "gdn": {"heads": 2, "value_heads": 4, "head_dim": 12, "expand_v": 1.5, "negative_eigenvalues": True},
    "mamba2": {"head_dim": 12, "state_dim": 20, "groups": 2},
    "swa": {"heads": 4, "kv_heads": 2, "head_dim": 12, "window": 7},
    "full": {"heads": 4, "kv_heads": 2, "head_dim": 12},
}


LAUNCHED = {
    "gdn": {"_convolve", "_rule", "_finish", "_forward"},
    "mamba2": {"_convolve", "_scan", "_finish", "_forward"},
    "swa": {"_rotate", "_store", "_partial"},
    "full": {"_rotate", "_store", "_partial"},
}


def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that are launched from now on."""
    names: list[str] = []
    run = InterpretedFunction.run

    def counted(self: InterpretedFunction, *values: object, **options: object) -> object:
        names.append(self.fn.__name__)
        return run(self, *values, **options)

    monkeypatch.setattr(InterpretedFunction, "run", counted)
    return names


def test_every_operator_reaches_its_kernel() -> None:
    checks = [check for check in check_backends("cpu") if check.backend == "triton"]
    assert {check.op for check in checks} == {
        *("causal_conv", "rotary", "ring_attention", "store_in_slots"),
        *("gated_delta_net_step", "mamba2_step", "swiglu", "rms_norm", "gated_rms_norm"),
    }
    for check in checks:
        assert check.passed, check
        assert check.error is not None
        assert check.error < 2e-6
        assert not check.chosen


@pytest.mark.parametrize("name", OPTIONS)
def test_mixers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged rows, the second one padded, then two tokens one by one."""
    torch.manual_seed(0)
    mixers = {
        backend: MIXERS[name](**OPTIONS[name], backend=backend).build(24).eval() for backend in ("reference", "triton")
    }
    for mixer in mixers.values():
        mixer.load_state_dict(mixers["reference"].state_dict())
    mixers["reference"].double()
    chunk, tokens = torch.randn(2, 9, 24), torch.randn(2, 2, 24)
    mask = torch.arange(9) < torch.tensor([[9], [5]])

    def run(mixer: torch.nn.Module, dtype: torch.dtype) -> list[Tensor]:
        state, outputs = mixer.init_state(2, dtype=dtype), []
        angles = torch.arange(11, dtype=dtype)[None, :, None] * torch.linspace(0.1, 1, 6, dtype=dtype).repeat(2)
        with torch.no_grad(), poisoned():
            for start, x in ((0, chunk), (9, tokens[:, :1]), (10, tokens[:, 1:])):
                part = angles[:, start : start + x.shape[1]].expand(2, -1, -1)
                sequence = Sequence({12: (part.cos(), part.sin())}, mask if start == 0 else None)
                outputs.append(mixer(x.to(dtype), sequence, state))
        return [*outputs, *(x for x in state.tensors().values() if x.is_floating_point())]

    right = run(mixers["reference"], torch.float64)
    launched = launches(monkeypatch)
    monkeypatch.setenv("HYBRIDVL_BACKEND", "rotary=triton,store_in_slots=triton,gated_rms_norm=triton")
    assert_near(run(mixers["triton"], torch.float32), right, 1e-5)
    assert set(launched) == LAUNCHED[name]


@pytest.mark.parametrize("name", ["gdn", "mamba2"])
def test_training_passes_by_kernels_without_a_backward_pass(name: str) -> None:
    torch.manual_seed(0)
    weights, gradients = MIXERS[name](**OPTIONS[name]).build(24).state_dict(), []
    for backend, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        mixer = MIXERS[name](**OPTIONS[name], backend=backend).build(24)
        mixer.load_state_dict(weights)
        x = torch.linspace(-1, 1, 9 * 24).view(1, 9, 24).to(dtype).requires_grad_()
        y = mixer.to(dtype)(x, Sequence(cu_seqlens=torch.tensor([0, 4, 9])))
        gradients.append([y, *torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])])
    assert_near(gradients[1], gradients[0], 2e-5)
