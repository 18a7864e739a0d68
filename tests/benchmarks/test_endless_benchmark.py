"""benchmarks/endless.py: curves of real streams, and verdicts on curves that are known."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from matplotlib.image import imread
from scipy import stats
from scripts import load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("endless")


def test_verdicts_on_known_curves(script: ModuleType) -> None:
    tokens = np.arange(1, 101) * 1000.0
    noise = np.random.default_rng(0).normal(0, 1e-5, 100)
    points = {
        "tokens": tokens.tolist(),
        "seconds": (0.01 + 0.002 * tokens / 100_000 + noise).tolist(),
        "resident": [9e9] * 10 + [1e8] * 50 + [1.01e8] * 40,  # the first tenth does not count
    }
    found = script.verdict(points)
    late = np.array(points["seconds"])[10:]
    assert found["frame_seconds"] == pytest.approx(late.mean())
    assert found["slope_percent"] == pytest.approx(100 * 0.002 / late.mean(), rel=0.01)
    low, high = found["slope_interval"]
    assert low < 100 * 0.002 / late.mean() < high
    wanted = stats.linregress(tokens[10:], late)
    assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, 88) * wanted.stderr * 100_000 * 100 / late.mean())
    assert found["resident_range_percent"] == pytest.approx(100 * 1e6 / (50 * 1e8 + 40 * 1.01e8) * 90)


def test_a_short_run_streams_and_draws(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--window", "16", "--width", "64", "--side", "2", "--tokens", "800", "--peer-tokens", "400"]
    assert script.main([*sizes, "--pattern", "swa gdn", "--peer", "full*2", "--out", str(tmp_path / "found")]) == 0
    report = json.loads((tmp_path / "found.json").read_text())
    hybrid, full = report["streams"]
    assert [hybrid["points"]["tokens"][-1] >= 800, full["points"]["tokens"][-1] >= 400] == [True, True]
    assert set(hybrid["points"]["state"]) == {hybrid["promised_state"]}
    assert full["points"]["state"][-1] == full["promised_state"] > full["points"]["state"][0]
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert imread(tmp_path / "found.png").shape[1] == 1350
