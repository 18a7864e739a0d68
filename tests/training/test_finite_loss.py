"""What is not finite reaches no weight, and the batch that made it can be tried again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lightning.pytorch import Callback

from hybridvl.layers.errors import RunError
from hybridvl.training.callbacks.exact_resume import ExactResume, set_random_state
from hybridvl.training.callbacks.finite_loss import FiniteLoss


class _Broken(Callback):
    """In one batch, counted from 0, the head's gradient is multiplied by a factor, or the first patch is."""

    def __init__(self, number: int, part: str, factor: float) -> None:
        self.number, self.part, self.factor = number, part, factor
        self.seen = -1

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen += 1
        if self.seen == self.number and self.part == "patch":
            batch["pixel_values"][0] *= self.factor

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        if self.seen == self.number and self.part == "gradient":
            weight = pl_module.net.lm_head_weight
            handle = weight.register_hook(lambda gradient: (handle.remove(), gradient * self.factor)[1])


@pytest.mark.parametrize(
    ("part", "factor", "what"),
    [
        ("patch", float("nan"), "the loss is nan"),
        ("gradient", float("inf"), "the loss is finite, but the norm of its gradient is (nan|inf)"),
        ("gradient", float("nan"), "the loss is finite, but the norm of its gradient is nan"),
    ],
)
@pytest.mark.parametrize("number", [4, 5])  # both batches of the third step
def test_the_step_is_not_taken(number: int, part: str, factor: float, what: str, tmp_path: Path) -> None:
    module, data = tiny.module(), tiny.data()
    trainer = tiny.trainer(tmp_path, 9, [ExactResume(), _Broken(number, part, factor), FiniteLoss()])
    trainer.accumulate_grad_batches = 2
    with pytest.raises(RunError, match=f"^step 3: {what}; the step was not taken; the batch is in "):
        trainer.fit(module, datamodule=data)
    expected = tiny.module()
    whole = tiny.trainer(tmp_path / "whole", 2, [ExactResume(), FiniteLoss()])
    whole.accumulate_grad_batches = 2
    whole.fit(expected, datamodule=tiny.data())
    assert tiny.same(module.state_dict(), expected.state_dict())
    [file] = tmp_path.glob("tiny/version_0/not_finite/*")
    saved = torch.load(file, weights_only=True)
    assert (file.name, saved["step"], saved["batch_idx"]) == ("step_3_process_0.pt", 3, number)
    set_random_state(saved["random"])
    loss = module.token_loss(saved["batch"]).loss
    assert bool(loss.isfinite()) is (part == "gradient")
    if part == "gradient":
        torch.testing.assert_close(float(loss.detach()) / 2, float(saved["loss"]))  # of two batches
        assert not saved["gradient_norm"] < float("inf")


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, 9, [_Broken(0, "patch", float("nan")), FiniteLoss()])
    trainer.fast_dev_run = 1
    with pytest.raises(RunError, match=r"^step 1: the loss is nan; the step was not taken; where training"):
        trainer.fit(tiny.module(), datamodule=tiny.data())
    assert not list(tmp_path.rglob("not_finite"))
