"""Small models of several patterns, wrapped for transformers, and prompts for them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from model_cases import VIDEO, VISION, joined_images, padded, prompt, prompts, small_config
from torch import Tensor
from transformers import AutoModelForImageTextToText

import hybridvl
from hybridvl.hf.modeling import HybridVLForConditionalGeneration
from hybridvl.models import VisionLanguageModel

Wrapped = HybridVLForConditionalGeneration
NO_VISUALS = [[90], [91]]  # bad_words_ids: tokens that stand for pictures


@dataclass(frozen=True)
class Case:
    """A pattern, with or without a vision tower and a tied head."""

    pattern: str
    vision: bool
    tied: bool
    seed: int

    def net(self) -> VisionLanguageModel:
        config = small_config(self.pattern, VISION if self.vision else None)
        config = dataclasses.replace(config, tie_embeddings=self.tied)
        torch.manual_seed(self.seed)
        return VisionLanguageModel(config).eval()

    def inputs(self) -> dict[str, Tensor]:
        """Three rows of different lengths, padded on the left, two of them with images."""
        rows = prompts() if self.vision else [prompt(n, [], n) for n in (5, 9, 2)]
        ids, mask = padded(rows, left=True)
        images = joined_images(rows) if self.vision else {}
        return {"input_ids": ids, "attention_mask": mask.long(), **images}

    def __str__(self) -> str:
        return f"{self.pattern}{'-vision' if self.vision else ''}{'' if self.tied else '-untied'}-{self.seed}"


CASES = [
    Case("full*2", vision=True, tied=True, seed=0),
    Case("(swa gdn)*2", vision=True, tied=False, seed=1),
    Case("gdn mamba2", vision=False, tied=True, seed=2),
    Case("mamba2*2", vision=False, tied=False, seed=3),
    Case("swa+mamba2 full+gdn", vision=True, tied=True, seed=4),
    Case("full gdn swa(window=3) mamba2", vision=False, tied=True, seed=5),
]


def reloaded(net: VisionLanguageModel, folder: Path) -> HybridVLForConditionalGeneration:
    """What transformers makes of the folder that we save."""
    hybridvl.save(net, folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert isinstance(model, HybridVLForConditionalGeneration)
    return model


def video_inputs(seed: int) -> dict[str, Tensor]:
    """One row with a video of two grids' frames between text tokens."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.tensor([[2, 4, 4]])
    text = torch.randint(0, 80, (7,), generator=generator).tolist()
    ids = torch.tensor([[*text[:3], *[VIDEO] * 8, *text[3:]]])
    return {
        "input_ids": ids,
        "pixel_values_videos": torch.randn(32, VISION.patch_dim, generator=generator),
        "video_grid_thw": grid,
        "second_per_grid_ts": torch.tensor([1.0]),
    }
