"""A small teacher, its student of linear layers, and pages of digits, shared by the tests of placements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import hybridvl
from hybridvl.data.digits import DigitPages
from hybridvl.data.images import ImageConfig
from hybridvl.data.module import ChatDataModule
from hybridvl.models.config import ModelConfig, VisionConfig
from hybridvl.models.vlm import VisionLanguageModel
from hybridvl.training.layer_distillation import LayerDistillation
from hybridvl.training.student import StudentConfig


def net(pattern: str) -> ModelConfig:
    return ModelConfig(
        pattern=pattern,
        width=32,
        mlp_width=48,
        vocab_size=512,
        rope_theta=1e4,
        init_std=0.2,  # large, so that layers differ from the identity
        image_token_id=6,
        video_token_id=7,
        vision_start_token_id=3,
        mixers={"full": {"heads": 2, "kv_heads": 1, "head_dim": 16}, "gdn": {"heads": 2, "head_dim": 8}},
        vision=VisionConfig(
            depth=1,
            width=32,
            heads=2,
            mlp_width=32,
            patch_size=4,
            temporal_patch_size=1,
            window_size=16,
            full_attention_blocks=(0,),
            channels=1,
        ),
    )


def teacher(folder: Path, pattern: str = "full*4") -> str:
    """The folder of a model of random weights."""
    torch.manual_seed(0)
    hybridvl.save(VisionLanguageModel(net(pattern)), folder)
    return str(folder)


def stage(folder: str, pattern: str = "gdn*4", **options: Any) -> LayerDistillation:
    """Stage I a before its first step, in float64."""
    torch.manual_seed(1)
    return LayerDistillation(StudentConfig(folder, pattern), **options).double().eval()


def batches(count: int = 2, turns: int = 2, floats: int = 64) -> list[dict[str, Any]]:
    """Padded validation batches of three conversations of different lengths; images have `floats` bits."""
    task = DigitPages(rows=(1, 2), columns=(1, 3), cell=8, eval_turns=turns, val_pages=3 * count, train_pages=4)
    images = ImageConfig(4, 1, 2, mean=(0.5,), std=(0.5,))
    data = ChatDataModule(task, images=images, batch_size=3, max_tokens=256, system=None)
    return [
        {key: _doubled(value) if floats == 64 else value for key, value in b.items()} for b in data.val_dataloader()
    ]


def _doubled(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
