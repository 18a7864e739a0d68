"""benchmarks/stream_recall.py: what its videos show, and what is counted as right."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scripts import load_script
from video_cases import decode_all

from hybridvl.data.digits import scan_splits, scans


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("stream_recall")


def test_videos_show_the_digits_that_are_asked_for(script: ModuleType, tmp_path: Path) -> None:
    path, labels, digits = script.made(tmp_path, 20, 3, 5)
    assert sorted(labels) == sorted("BKQX")
    assert len(set(labels.values())) == 4
    assert max(labels.values()) < 8
    shown = decode_all(path).astype(float).mean(axis=-1)
    assert shown.shape == (20, 64, 64)
    # The nearest test scan, by its ink on 8 x 8 cells, is of the digit that is meant.
    own = scan_splits()["test"]
    pixels, classes = scans()
    for place, digit in zip(labels.values(), digits, strict=True):
        ink = shown[place].reshape(8, 8, 8, 8).mean(axis=(1, 3)).max() - shown[place].reshape(8, 8, 8, 8).mean((1, 3))
        candidates = pixels[own].reshape(len(own), -1).astype(float)
        found = np.corrcoef(np.concatenate([ink.reshape(1, -1), candidates]))[0, 1:].argmax()
        assert classes[own][found] == digit


def test_intervals(script: ModuleType) -> None:
    right = np.zeros((2, 10, 4), dtype=bool)
    right[:, :9] = True
    found = script.interval(right)
    assert found["accuracy"] == pytest.approx(0.9)
    assert found["questions"] == 80
    # Nine of ten videos are right in both models: a binomial share of 10.
    assert found["interval"] == pytest.approx([0.7, 1.0])
