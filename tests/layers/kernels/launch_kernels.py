"""How many kernels a step of a frame or a token starts on a GPU, counted in Triton's interpreter: at a few microseconds
each they are what small steps take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from model_cases import small_config
from torch.utils._python_dispatch import TorchDispatchMode
from traced_steps import reads_on_the_host
from triton.runtime.interpreter import InterpretedFunction

from hybridvl.models.generation import StepRunner
from hybridvl.models.vlm import VisionLanguageModel

# Operators of PyTorch that start no kernel.
VIEWS = {
    *("view", "_unsafe_view", "_reshape_alias", "alias", "as_strided", "detach", "lift_fresh", "promote_types"),
    *("t", "transpose", "permute", "expand", "squeeze", "unsqueeze", "unflatten"),
    *("slice", "select", "split", "split_with_sizes", "unbind", "empty", "empty_like", "new_empty"),
}


class Launches(TorchDispatchMode):
    """Counts what is started within; what the interpreter does for a Triton kernel counts as one."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.interpreting = False

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.overloadpacket.__name__
        if name not in VIEWS and not self.interpreting:
            self.counts[name] += 1
        return op(*args, **(kwargs or {}))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    launches, run = Launches(), InterpretedFunction.run

    def interpreted(self: InterpretedFunction, *values: object, **options: object) -> object:
        launches.counts[self.fn.__name__] += 1
        launches.interpreting = True
        try:
            return run(self, *values, **options)
        finally:
            launches.interpreting = False

    with monkeypatch.context() as patch, launches:
        patch.setattr(InterpretedFunction, "run", interpreted)
        yield launches.counts


def launches_of(pattern: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Of a frame of so many tokens, or of a decoded token, without the chunked delta rule (fla's, on a GPU)."""
    torch.manual_seed(0)
    model = VisionLanguageModel(small_config(pattern)).eval()
    runner, state = StepRunner(model), model.init_state(1)
    monkeypatch.setenv("HYBRIDVL_BACKEND", "triton")
    monkeypatch.setattr(
        "hybridvl.layers.gdn.gated_delta_rule", lambda q, k, v, *_, initial_state, **options: (v, initial_state)
    )
    with torch.no_grad(), reads_on_the_host(allowed=False):
        embeds, positions = torch.randn(1, 8, model.config.width), torch.arange(8).expand(3, 1, 8)
        runner.run(embeds, positions, None, state)
        with counted(monkeypatch) as counts:
            if tokens == 1:
                runner.decode(torch.ones(1, dtype=torch.int64), state)
            else:
                runner.run(embeds[:, :tokens], positions[:, :, :tokens] + 8, None, state)
    return counts


@pytest.mark.parametrize(
    ("layer", "tokens", "most"), [("gdn", 1, 17), ("swa", 1, 19), ("gdn", 6, 29), ("swa", 6, 19), ("mamba2", 1, 12)]
)
def test_launches_of_a_layer(layer: str, tokens: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its norms and its MLP; one launch more where attention is split."""
    one, two = (launches_of(pattern, tokens, monkeypatch) for pattern in ("swa gdn mamba2", f"swa gdn mamba2 {layer}"))
    assert 0 < (two - one).total() <= most, two - one
