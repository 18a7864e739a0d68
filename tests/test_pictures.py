"""Pictures are alike on every machine, whatever a matplotlibrc there asks for."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from strange_style import strange_style

from hybridvl.bench.plots import draw_growth, draw_ratios
from hybridvl.models.config import ModelConfig
from hybridvl.pictures import default_style, figure, plain, png
from hybridvl.plan.costs import plan_model
from hybridvl.plan.drawing import draw as draw_plans
from hybridvl.training.callbacks.examples import draw as draw_example

SIDE = {"name": "ours", "median": 0.002, "quartile_low": 0.001, "quartile_high": 0.003, "scratch_bytes": 1_000_000}
RECORDS: list[dict[str, Any]] = [
    {
        "title": f"gdn, {length} tokens",
        "sizes": {"T": length},
        "direction": "forward",
        "sides": [SIDE, {**SIDE, "name": "theirs", "median": 0.003}],
        "ratios": {"theirs": {"median": 1.5, "low": 1.2, "high": 1.8}},
        "goal": 1.0,
        "goal_peer": "theirs",
    }
    for length in (64, 128)
]


def plans(_: Path) -> bytes:
    data = io.BytesIO()
    draw_plans([plan_model(ModelConfig(pattern="(swa gdn*3)*2"), (128, 1024))], data)
    return data.getvalue()


def growth(path: Path) -> bytes:
    draw_growth(RECORDS, "T", "Growth", path)
    return path.read_bytes()


def ratios(path: Path) -> bytes:
    draw_ratios(RECORDS, "Ratios", path)
    return path.read_bytes()


def example(_: Path) -> bytes:
    return draw_example(np.zeros((8, 8, 1), dtype=np.uint8), "How much is $5?", "7", "5").tobytes()


@pytest.mark.parametrize("draw", [plans, growth, ratios, example])
def test_a_picture_does_not_depend_on_a_matplotlibrc(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, draw: Callable[[Path], bytes]
) -> None:
    """Those of reports and of placements are in tests/ablation."""
    usual = draw(tmp_path / "usual.png")
    with strange_style():
        assert draw(tmp_path / "strange.png") == usual
    assert "No Such Font" not in caplog.text


def test_the_style_of_a_person_is_theirs_again_afterwards() -> None:
    with strange_style():
        asked = dict(matplotlib.rcParams)
        with default_style():
            assert matplotlib.rcParams["axes.facecolor"] == "white"
        assert dict(matplotlib.rcParams) == asked


@default_style()
def drawn(text: str) -> bytes:
    made = figure(3, 1)
    made.text(0.1, 0.5, text)
    return png(made)


def test_a_dollar_sign_is_no_formula() -> None:
    assert drawn(plain("$a$ b")) != drawn("$a$ b")
    assert drawn(plain("a b")) == drawn("a b")
