"""Small models, prompts with images and recorded outputs of other implementations, shared by the tests of models."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from hybridvl.models.config import ModelConfig, VisionConfig
from hybridvl.models.vlm import VisionLanguageModel

DATA = Path(__file__).parent / "data"
IMAGE, VIDEO = 90, 91
ATTENTION = {"heads": 4, "kv_heads": 2, "head_dim": 16}
MIXERS = {
    "full": ATTENTION,
    "swa": {**ATTENTION, "window": 8},
    "gdn": {"heads": 2, "value_heads": 4, "head_dim": 8},
    "mamba2": {"head_dim": 16, "state_dim": 8, "groups": 2},
}
VISION = VisionConfig(depth=2, width=32, heads=2, mlp_width=40, window_size=56, full_attention_blocks=(1,))


@dataclass(frozen=True)
class Recorded:
    """A folder of tests/data: the inputs given to another implementation and what it answered."""

    folder: Path
    inputs: dict[str, Tensor] = field(init=False)
    expected: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", load_file(self.folder / "inputs.safetensors"))
        object.__setattr__(self, "expected", load_file(self.folder / "expected.safetensors"))


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest wanted magnitude; shapes must agree and all numbers be finite."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    assert torch.isfinite(found).all()
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


def small_config(pattern: str, vision: VisionConfig | None = VISION) -> ModelConfig:
    """A model of width 32 whose weights are large enough that every token matters to every later one."""
    return ModelConfig(
        pattern=pattern,
        mixers=MIXERS,
        width=32,
        mlp_width=48,
        vocab_size=96,
        vision=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=89,
        init_std=0.15,
    )


def small_model(pattern: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> VisionLanguageModel:
    torch.manual_seed(seed)
    return VisionLanguageModel(small_config(pattern)).to(dtype).eval()


@dataclass
class Prompt:
    """One row of tokens with its images."""

    input_ids: Tensor  # (1, T)
    pixel_values: Tensor | None = None
    image_grid_thw: Tensor | None = None


def prompt(text: int, grids: list[tuple[int, int, int]], seed: int) -> Prompt:
    """`text` random tokens, then each image between two of them, then two more."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 80, (text,), generator=generator).tolist()
    for t, h, w in grids:
        ids += [IMAGE] * (t * h * w // 4) + torch.randint(0, 80, (2,), generator=generator).tolist()
    if not grids:
        return Prompt(torch.tensor([ids]))
    patches = sum(t * h * w for t, h, w in grids)
    pixels = torch.randn(patches, VISION.patch_dim, generator=generator)
    return Prompt(torch.tensor([ids]), pixels, torch.tensor(grids))


def prompts() -> list[Prompt]:
    """Rows of different lengths, with two images, none and one."""
    return [prompt(6, [(1, 4, 6), (1, 6, 6)], 1), prompt(11, [], 2), prompt(3, [(1, 8, 4)], 3)]


def joined_images(rows: list[Prompt]) -> dict[str, Tensor]:
    """The images of several rows as the model takes them."""
    pixels = [row.pixel_values for row in rows if row.pixel_values is not None]
    grids = [row.image_grid_thw for row in rows if row.image_grid_thw is not None]
    return {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.cat(grids)}


def padded(rows: list[Prompt], left: bool) -> tuple[Tensor, Tensor]:
    """(B, T) tokens and mask; padding holds a token that would be noticed if it were read."""
    longest = max(row.input_ids.shape[1] for row in rows)
    ids = torch.full((len(rows), longest), 85)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for number, row in enumerate(rows):
        length = row.input_ids.shape[1]
        place = slice(longest - length, longest) if left else slice(0, length)
        ids[number, place], mask[number, place] = row.input_ids[0], True
    return ids, mask


def packed(rows: list[Prompt]) -> tuple[Tensor, Tensor]:
    """(1, T) tokens and cu_seqlens."""
    lengths = torch.tensor([0, *(row.input_ids.shape[1] for row in rows)])
    return torch.cat([row.input_ids for row in rows], dim=1), lengths.cumsum(0)
