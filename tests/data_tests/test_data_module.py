"""Tests of hybridvl.data.module: Lightning resumes at the next batch, YAML builds it, settings are checked."""

import pytest
import torch
from data_cases import assert_same_batches, small_module
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from hybridvl.data import ChatDataModule, DigitPages
from hybridvl.layers import ConfigError


class Recorder(LightningModule):
    """Keeps the batches it is trained on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch)
        return self.weight * 0

    def validation_step(self, batch, batch_idx):
        assert not self.training

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(folder, steps, resume=None, saving=None, **options):
    """The batches of a run of `steps` steps that saves every 5 steps."""
    module = Recorder()
    saving = saving or ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    trainer = Trainer(
        max_steps=steps,
        callbacks=[saving],
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        **options.pop("trainer", {}),
    )
    trainer.fit(module, datamodule=small_module(**options), ckpt_path=resume, weights_only=True)
    return module.seen


@pytest.mark.parametrize(
    "options",
    [
        {"workers": 2},
        {"workers": 0, "packing": True, "max_tokens": 400, "epoch_batches": 7},
        # The checkpoint falls on the end of an epoch, where validation runs first.
        {"workers": 0, "epoch_batches": 5},
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_at_the_next_batch(tmp_path, options):
    whole = fit(tmp_path / "whole", 14, **options)
    assert len(whole) == 14
    first = fit(tmp_path / "cut", 5, **options)
    rest = fit(tmp_path / "cut", 14, resume=tmp_path / "cut" / "step=5.ckpt", **options)
    assert_same_batches(first + rest, whole)


@pytest.mark.filterwarnings("ignore")
def test_checkpoints_at_the_end_of_an_epoch_resume_too(tmp_path):
    """Here Lightning does not count itself as restarting and leaves the loader's own state alone."""

    def epochs(folder, count, resume=None):
        saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        return fit(folder, -1, resume, saving=saving, epoch_batches=4, trainer={"max_epochs": count})

    whole = epochs(tmp_path / "whole", 3)
    assert len(whole) == 12
    assert_same_batches(epochs(tmp_path / "cut", 3, tmp_path / "whole" / "epoch=1.ckpt"), whole[8:])


def test_state_is_kept_for_a_loader_made_later():
    module = small_module()
    iterator = iter(module.train_dataloader())
    for _ in range(3):
        next(iterator)
    resumed = small_module()
    resumed.load_state_dict(module.state_dict())
    assert_same_batches(list(resumed.train_dataloader()), list(iterator))
    assert small_module().state_dict() == {}


def test_the_command_line_builds_it():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ChatDataModule, "data")
    config = parser.parse_object(
        {
            "data": {
                "class_path": "hybridvl.data.ChatDataModule",
                "init_args": {
                    "task": {
                        "class_path": "hybridvl.data.DigitPages",
                        "init_args": {"rows": [1, 2], "kinds": {"line": 1}},
                    },
                    "images": {"patch_size": 4, "mean": [0.5], "std": [0.5]},
                },
            }
        }
    )
    module = parser.instantiate(config).data
    assert module.task.rows == (1, 2)
    assert module.task.kinds == {"line": 1}
    assert module.images.config.patch_size == 4
    assert next(iter(module.val_dataloader()))["pixel_values"].shape[1] == 2 * 16


@pytest.mark.parametrize("name", ["DigitPages", "EasyVQA", "MessageData"])
def test_every_task_is_known_by_its_short_name(name):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ChatDataModule, "data")
    settings = {"path": "x.jsonl", "columns": {"messages": "chat"}} if name == "MessageData" else {}
    task = {"class_path": f"hybridvl.data.{name}", "init_args": settings}
    config = parser.parse_object({"data": {"class_path": "hybridvl.data.ChatDataModule", "init_args": {"task": task}}})
    built = parser.instantiate(config).data.task
    assert type(built).__name__ == name
    if name == "MessageData":
        assert built.columns.messages == "chat"


def test_an_epoch_is_one_pass_where_that_can_be_counted():
    assert len(small_module().train_dataloader()) == 6
    assert len(small_module(epoch_batches=9).train_dataloader()) == 9
    assert len(small_module(packing=True).train_dataloader()) == 1000


def test_a_context_too_short_for_a_page_is_named():
    with pytest.raises(
        ConfigError,
        match=r"val sample 1: its last answer ends at 43 tokens .* the context data\.max_tokens = 40",
    ):
        next(iter(small_module(max_tokens=40).val_dataloader()))


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 0}, {"eval_batch_size": 0}, {"max_tokens": 0}, {"epoch_batches": 0}, {"train_samples": -1}],
)
def test_bad_settings_are_named(options):
    name, value = next(iter(options.items()))
    with pytest.raises(ConfigError, match=rf"data\.{name}: {value}; expected at least 1"):
        ChatDataModule(DigitPages(), **options)


def test_negative_workers_are_named():
    with pytest.raises(ConfigError, match=r"data\.workers: -1; expected at least 0"):
        ChatDataModule(workers=-1)
