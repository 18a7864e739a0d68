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

from hybridvl.bench.plots import draw_lengths, draw_ratios, lengths_figure
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
        "dtype": "float32",
        "device": "cpu",
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
    draw_lengths(RECORDS, "Growth", path)
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


@pytest.mark.parametrize(("frames", "unit"), [(1, "frame"), (None, "token")])
def test_time_and_memory_against_the_context(frames: int | None, unit: str) -> None:
    """Also of an empty context, on an axis of powers of 2."""
    contexts = (0, 1024, 4096)
    records = [
        {
            "sizes": {"D": 64, "T": context},
            "direction": "stream" if frames else "decode",
            "dtype": "float32",
            "device": "cpu",
            "frames": frames,
            "tokens": 4,
            "sides": [{**SIDE, "weight_bytes": 4_000_000, "state_bytes": 1000 * context}],
        }
        for context in contexts
    ]
    with default_style():
        made = lengths_figure(records, "Streams")
        made.canvas.draw()
    time, memory = made.axes
    assert time.get_ylabel() == f"ms a {unit}"
    [line] = memory.lines
    assert line.get_ydata() == pytest.approx([4_000_000, 5_024_000, 8_096_000])
    assert list(time.lines[0].get_ydata()) == pytest.approx([2.0 if frames else 0.5] * 3)
    for axes in (time, memory):
        assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1K", "4K"]
        places = axes.transData.transform([(context, 1.0) for context in contexts])[:, 0]
        assert 100 < places[1] - places[0] < places[2] - places[0] - 100


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
