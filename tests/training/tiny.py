"""A two-layer model and the smallest pages, shared by the tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger

from hybridvl.data.digits import DigitPages
from hybridvl.data.images import ImageConfig
from hybridvl.data.module import ChatDataModule
from hybridvl.models.config import ModelConfig, VisionConfig
from hybridvl.training.checkpoints.files import AtomicCheckpointIO
from hybridvl.training.optim import OptimizerConfig
from hybridvl.training.supervised import SupervisedTuning

PATCH = 4


def net(pattern: str = "(swa gdn)") -> ModelConfig:
    return ModelConfig(
        pattern=pattern,
        width=32,
        mlp_width=64,
        vocab_size=1024,
        rope_theta=1e4,
        image_token_id=6,
        video_token_id=7,
        vision_start_token_id=3,
        mixers={
            "full": {"heads": 2, "kv_heads": 1, "head_dim": 16},
            "swa": {"heads": 2, "kv_heads": 1, "head_dim": 16, "window": 16},
            "gdn": {"heads": 2, "head_dim": 8},
            "mamba2": {"head_dim": 16, "state_dim": 16},
        },
        vision=VisionConfig(
            depth=1,
            width=32,
            heads=2,
            mlp_width=32,
            patch_size=PATCH,
            temporal_patch_size=1,
            window_size=16,
            full_attention_blocks=(0,),
            channels=1,
        ),
    )


def data(packing: bool = False, seed: int = 0, turns: int = 2, batch_size: int = 4) -> ChatDataModule:
    task = DigitPages(
        rows=(1, 2), columns=(1, 2), cell=8, turns=turns, eval_turns=1, train_pages=32, val_pages=8, test_pages=8
    )
    return ChatDataModule(
        task,
        images=ImageConfig(PATCH, 1, 2, mean=(0.5,), std=(0.5,)),
        batch_size=batch_size,
        max_tokens=256,
        packing=packing,
        seed=seed,
        system=None,
    )


def batch(packing: bool = False, split: str = "train", turns: int = 2) -> dict[str, Any]:
    module = data(packing, turns=turns)
    loader = module.train_dataloader() if split == "train" else module.val_dataloader()
    return next(iter(loader))


def module(
    pattern: str = "(swa gdn)", seed: int = 0, lr: float = 3e-3, freeze: tuple[str, ...] = ()
) -> SupervisedTuning:
    seed_everything(seed, verbose=False)
    return SupervisedTuning(net(pattern), OptimizerConfig(lr=lr, warmup_steps=2), freeze=freeze, reply_tokens=8)


def trainer(
    root: Path,
    steps: int,
    callbacks: list[Callback],
    log_every: int = 1,
    validate: int = 0,
    epochs: int | None = None,
) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=epochs,
        plugins=[AtomicCheckpointIO()],
        logger=TensorBoardLogger(root, "tiny", default_hp_metric=False),
        callbacks=callbacks,
        log_every_n_steps=log_every,
        val_check_interval=validate or None,
        limit_val_batches=1.0 if validate else 0,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any("Checkpoint" in type(callback).__name__ for callback in callbacks),
    )


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) of every scalar in a run folder, in the order of steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.glob("events.*")):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    return {tag: sorted(values) for tag, values in found.items()}


def same(left: Any, right: Any) -> bool:
    """Whether two nested values are equal, tensors to the last bit."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)
