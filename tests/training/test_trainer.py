"""Lightning's trainer answers what hybridvl.training.trainer asks it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from lightning.pytorch import Callback, Trainer

from hybridvl.training.callbacks.run_summary import RunSummary
from hybridvl.training.trainer import callback_of, validates_by_clock


@pytest.mark.parametrize(("interval", "by_clock"), [({"seconds": 3}, True), (3, False), (0.5, False)])
def test_lightning_tells_whether_it_validates_by_the_clock(interval: Any, by_clock: bool) -> None:
    every = 1 if isinstance(interval, float) else None
    trainer = Trainer(val_check_interval=interval, check_val_every_n_epoch=every, accelerator="cpu", logger=False)
    assert validates_by_clock(trainer) is by_clock


def test_the_callback_of_a_kind(tmp_path: Path) -> None:
    class Other(Callback):
        pass

    summary = RunSummary()
    trainer = tiny.trainer(tmp_path, 1, [Other(), summary])
    assert callback_of(trainer, RunSummary) is summary
    assert callback_of(tiny.trainer(tmp_path, 1, [Other()]), RunSummary) is None
