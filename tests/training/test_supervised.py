"""SupervisedTuning: its loss, overfitting, determinism, validation and generated tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer, seed_everything

from hybridvl.layers.errors import ConfigError
from hybridvl.training.answers import answers_right, model_inputs
from hybridvl.training.optim import OptimizerConfig
from hybridvl.training.supervised import SupervisedTuning


@pytest.mark.parametrize("packing", [False, True])
def test_loss_is_that_of_the_full_logits(packing: bool) -> None:
    module, batch = tiny.module(), tiny.batch(packing)
    loss, hits = module.token_loss(batch)
    logits = module.net(**model_inputs(batch)).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(hits, (logits.argmax(-1) == targets)[targets != -100])


def test_packed_and_padded_rows_have_the_same_loss() -> None:
    module = tiny.module("(full gdn mamba2 swa)")
    rows = next(iter(tiny.data(packing=True).train_dataloader()))
    segments = len(rows["cu_seqlens"]) - 1
    same = next(iter(tiny.data(batch_size=segments).train_dataloader()))
    torch.testing.assert_close(module.token_loss(rows)[0], module.token_loss(same)[0], rtol=1e-5, atol=1e-6)
    assert segments > 1


@pytest.mark.parametrize("pattern", ["(swa gdn)", "mamba2*2"])
def test_one_batch_is_overfitted_to_zero_loss(pattern: str) -> None:
    module, batch = tiny.module(pattern), tiny.batch()
    optimizer = torch.optim.AdamW(module.parameters(), lr=5e-3, weight_decay=0.0)
    first = float(module.token_loss(batch).loss.detach())
    for _ in range(150):
        optimizer.zero_grad()
        loss, hits = module.token_loss(batch)
        loss.backward()
        optimizer.step()
    assert first > 5.0
    assert float(loss.detach()) < 1e-2
    assert bool(hits.all())


class _Losses(Callback):
    """Keeps every training loss."""

    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(outputs["loss"].clone())


def _fit(root: Path, seed: int) -> tuple[list[torch.Tensor], SupervisedTuning]:
    losses = _Losses()
    module = tiny.module(seed=seed)
    tiny.trainer(root, 12, [losses]).fit(module, datamodule=tiny.data(seed=seed))
    return losses.values, module


def test_same_seed_same_loss_curve_to_the_last_bit(tmp_path: Path) -> None:
    first, one = _fit(tmp_path, 3)
    second, other = _fit(tmp_path, 3)
    third, _ = _fit(tmp_path, 4)
    assert tiny.same(first, second)
    assert tiny.same(one.state_dict(), other.state_dict())
    assert not tiny.same(first, third)
    assert len(first) == 12


def test_the_generated_score_is_the_teacher_forced_one(tmp_path: Path) -> None:
    # Greedy replies are exactly right if and only if every teacher-forced token is.
    module, datamodule = tiny.module(lr=1e-2), tiny.data(turns=1)
    # Counts are learned soonest, most are 0 or 1; cells are not learned in so few steps.
    datamodule.task.kinds = {"count": 1.0, "cell": 1.0}
    trainer = tiny.trainer(tmp_path, 60, [], validate=8)
    trainer.fit(module, datamodule=datamodule)
    trainer.test(module, datamodule=datamodule, verbose=False)
    tested = dict(trainer.callback_metrics)
    right = total = 0
    for batch in datamodule.test_dataloader():
        with torch.no_grad():
            hits = module.token_loss(batch).hits
        answers = answers_right(batch["labels"], hits)
        right, total = right + int(answers.sum()), total + len(answers)
    assert float(tested["test/exact"]) == pytest.approx(right / total)
    assert 0 < right < total
    assert float(tested["test/count_exact"]) > float(tested["test/cell_exact"])
    assert float(tested["test/cell_exact"]) == float(tested["test/digit_accuracy"])


def test_metrics_of_validation_are_means_over_tokens_and_answers(tmp_path: Path) -> None:
    module, datamodule = tiny.module(), tiny.data(batch_size=5)
    trainer = tiny.trainer(tmp_path, 1, [], validate=1)
    found = trainer.validate(module, datamodule=datamodule, verbose=False)[0]
    losses, counts = [], []
    for batch in datamodule.val_dataloader():
        with torch.no_grad():
            loss, hits = module.token_loss(batch)
        losses.append(float(loss))
        counts.append(len(hits))
    assert len(set(counts)) > 1
    expected = sum(a * b for a, b in zip(losses, counts, strict=True)) / sum(counts)
    assert found["val/loss"] == pytest.approx(expected, rel=1e-5)
    assert {"val/token_accuracy", "val/exact"} < set(found)
    assert any(name.endswith("_exact") for name in found)


def test_frozen_parts_do_not_change(tmp_path: Path) -> None:
    module = tiny.module(freeze=("visual", "decoder.embed_tokens.weight"))
    before = {name: tensor.clone() for name, tensor in module.net.state_dict().items()}
    tiny.trainer(tmp_path, 2, []).fit(module, datamodule=tiny.data())
    for name, tensor in module.net.state_dict().items():
        frozen = name.startswith("visual.") or name == "decoder.embed_tokens.weight"
        assert torch.equal(tensor, before[name]) == frozen, name


def test_freezing_what_is_not_there_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"model\.freeze: .*'vison'.*visual"):
        tiny.module(freeze=("vison",))


@pytest.mark.parametrize("name", ["loss_chunk", "reply_tokens"])
def test_lengths_must_be_positive(name: str) -> None:
    with pytest.raises(ConfigError, match=f"model.{name}: 0"):
        SupervisedTuning(tiny.net(), **{name: 0})


def test_a_checkpoint_of_another_pattern_names_the_layers(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, 1, [])
    trainer.fit(tiny.module("(swa gdn)"), datamodule=tiny.data())
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    other = tiny.trainer(tmp_path, 2, [])
    with pytest.raises(ConfigError, match=r"layer 1.*gdn.*mamba2"):
        other.fit(tiny.module("(swa mamba2)"), datamodule=tiny.data(), ckpt_path=str(tmp_path / "a.ckpt"))


def test_without_an_end_the_schedule_needs_total_steps(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, -1, [], epochs=-1)
    with pytest.raises(ConfigError, match="total_steps"):
        trainer.fit(tiny.module(), datamodule=tiny.data())


def test_a_batch_without_labels_gives_zero_loss() -> None:
    batch = tiny.batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    module = tiny.module()
    module.token_loss(batch).loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in module.parameters())


def test_bfloat16_autocast_trains(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    module = SupervisedTuning(tiny.net(), OptimizerConfig(warmup_steps=1))
    batch = tiny.batch()
    plain = module.token_loss(batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        mixed = module.token_loss(batch).loss
    mixed.backward()
    assert float(mixed.detach()) == pytest.approx(float(plain.detach()), rel=2e-2)
    assert all(
        p.grad is None or (p.grad.dtype == torch.float32 and p.grad.isfinite().all()) for p in module.parameters()
    )


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped_as_the_trainer_says(precision: Any, algorithm: str) -> None:
    class Clipped(Callback):
        largest = norm = 0.0

        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            if gradients:
                self.norm = max(self.norm, float(torch.nn.utils.get_total_norm(gradients)))
                self.largest = max(self.largest, *(float(gradient.abs().max()) for gradient in gradients))

    seen = Clipped()
    trainer = Trainer(
        max_steps=3,
        accelerator="cpu",
        precision=precision,
        gradient_clip_val=0.01,
        gradient_clip_algorithm=algorithm,
        callbacks=[seen],
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(tiny.module(), datamodule=tiny.data())
    measured = seen.norm if algorithm == "norm" else seen.largest
    assert measured == pytest.approx(0.01, rel=1e-3)


def test_answers_without_a_kind_have_no_metric_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    module, logged = tiny.module(), {}
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: value}))
    module._kind_right.update({"": 1, "line": 3})
    module._kind_total.update({"": 2, "line": 4})
    module.on_validation_epoch_end()
    assert logged == {"val/line_exact": 0.75}
