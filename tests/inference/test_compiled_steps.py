"""Compiled steps: each shape is compiled once, and goes on being right when a window is full and begins anew."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from model_cases import small_model
from torch._dynamo.utils import counters
from traced_steps import Pair, TraceRecorder

from hybridvl.inference.graphs import StepGraphs

TOLERANCE = 1e-5
STEPS = 14  # the window of 8 tokens is full, and begins anew


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch.compiler.reset()


@pytest.fixture
def without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that torch.compile does but the generation of code, which takes minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.mark.usefixtures("without_code")
@pytest.mark.parametrize("pattern", ["swa gdn", "mamba2 (swa+gdn)"])
def test_each_shape_is_compiled_once(pattern: str) -> None:
    model = small_model(pattern)
    pair = Pair(model, StepGraphs(model, compiled=True))
    assert pair.frame(5) < TOLERANCE  # a shape that comes once is not compiled
    assert max(pair.frame(2) for _ in range(STEPS)) < TOLERANCE
    assert counters["stats"]["unique_graphs"] == 1
    assert max(pair.token() for _ in range(STEPS)) < TOLERANCE
    assert counters["stats"]["unique_graphs"] == 2
    pair.state, pair.right = pair.state.clone(), pair.right.clone()  # as a question does
    assert max(pair.token() for _ in range(3)) < TOLERANCE
    assert max(pair.frame(2) for _ in range(3)) < TOLERANCE
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    assert pair.runner.uncompiled is None


@pytest.mark.usefixtures("without_code")
def test_what_cannot_be_compiled_runs_by_itself() -> None:
    model = small_model("swa gdn")
    model.decoder.layers[1].register_forward_hook(lambda *_: torch._dynamo.graph_break())
    pair = Pair(model, StepGraphs(model, compiled=True))
    assert max(pair.frame(2) for _ in range(4)) == 0
    assert pair.runner.uncompiled


@pytest.mark.usefixtures("without_code")
def test_more_shapes_than_are_compiled_run_by_themselves() -> None:
    model = small_model("swa gdn")
    pair = Pair(model, StepGraphs(model, compiled=True))
    with torch._dynamo.config.patch(recompile_limit=1):
        for tokens in (2, 3, 4, 3, 2):
            assert max(pair.frame(tokens) for _ in range(2)) < TOLERANCE
    assert pair.runner.uncompiled


@pytest.mark.usefixtures("without_code")
def test_compiled_steps_are_recorded_after_they_were_compiled() -> None:
    class Late(TraceRecorder):
        def record(self, step, inputs, bound):  # type: ignore[no-untyped-def]
            assert counters["stats"]["unique_graphs"] == 1
            raise RuntimeError("enough")

    model = small_model("swa gdn")
    pair = Pair(model, StepGraphs(model, compiled=True, recorder=Late()))
    assert max(pair.frame(2) for _ in range(4)) < TOLERANCE
    assert pair.runner.reason == "enough"
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.timeout(600)
def test_generated_code() -> None:
    model = small_model("swa")
    pair = Pair(model, StepGraphs(model, compiled=True))
    assert max(pair.token() for _ in range(20)) < TOLERANCE
    assert counters["stats"]["unique_graphs"] == 1
    assert pair.runner.uncompiled is None
