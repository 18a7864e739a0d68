"""The vision tower: recorded features, a naive dense version, batches of images of many sizes, mistakes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import DATA, VISION, Recorded, relative_error
from safetensors.torch import load_file
from torch import Tensor

from hybridvl.layers import ConfigError
from hybridvl.models.config import VisionConfig
from hybridvl.models.vision import VisionTower
from hybridvl.models.vision_plan import vision_plan

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tower() -> VisionTower:
    torch.manual_seed(0)
    return VisionTower(VISION, 24).double()


@pytest.mark.parametrize(
    ("kind", "pixels", "grid"),
    [("image", "pixel_values", "image_grid_thw"), ("video", "pixel_values_videos", "video_grid_thw")],
)
def test_recorded_features(kind: str, pixels: str, grid: str) -> None:
    recorded = Recorded(DATA / "qwen2_5_vl_tiny")
    config = VisionConfig(depth=4, width=32, heads=2, mlp_width=48, window_size=56, full_attention_blocks=(1, 3))
    tower = VisionTower(config, 64)
    weights = load_file(recorded.folder / "model.safetensors")
    prefix = "visual."
    tower.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    blocks: list[Tensor] = []
    features = tower(recorded.inputs[pixels].float(), recorded.inputs[grid], blocks)
    assert relative_error(features, recorded.expected[f"vision.{kind}.features"]) < 2e-5
    assert relative_error(torch.stack(blocks), recorded.expected[f"vision.{kind}.blocks_window_order"]) < 2e-5
    plan = vision_plan(tuple(map(tuple, recorded.inputs[grid].tolist())), config, CPU)
    assert torch.equal(plan.order, recorded.expected[f"vision.{kind}.window_index"])
    assert torch.equal(
        plan.rows_columns.unflatten(0, (-1, 4))[plan.inverse].flatten(0, 1), recorded_places(recorded, kind)
    )


def recorded_places(recorded: Recorded, kind: str) -> Tensor:
    return recorded.expected[f"vision.{kind}.pos_hw"]


def naive_features(tower: VisionTower, pixels: Tensor, grids: list[tuple[int, int, int]]) -> Tensor:
    """Every patch against every other under a mask, patches in their own order, no plan."""
    config, places = tower.config, []
    side = config.window_size // config.patch_size
    for number, (t, h, w) in enumerate(grids):
        for frame in range(t):
            for r, c in [(r, c) for r in range(0, h, 2) for c in range(0, w, 2)]:
                places += [(number, frame, r + dr, c + dc) for dr in (0, 1) for dc in (0, 1)]
    owner = torch.tensor([[n, f] for n, f, _, _ in places])
    window = torch.tensor([[r // side, c // side] for _, _, r, c in places])
    same_frame = (owner[:, None] == owner).all(-1)
    same_window = same_frame & (window[:, None] == window).all(-1)
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)
    angles = torch.tensor([[r, c] for _, _, r, c in places]).double()[:, :, None] * frequency
    angles = torch.cat([angles.flatten(1)] * 2, dim=1)[:, None]

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()

    x = pixels @ tower.patch_embed.proj.weight.flatten(1).T
    for number, block in enumerate(tower.blocks):
        q, k, v = block.attn.qkv(block.norm1(x)).view(len(x), 3, config.heads, -1).unbind(1)
        scores = torch.einsum("ihk,jhk->hij", turn(q), turn(k)) / config.head_dim**0.5
        allowed = same_frame if number in config.full_attention_blocks else same_window
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        x = x + block.attn.proj(torch.einsum("hij,jhk->ihk", weights, v).flatten(1))
        y = block.norm2(x)
        x = x + block.mlp.down_proj(F.silu(block.mlp.gate_proj(y)) * block.mlp.up_proj(y))
    return tower.merger(x)


grid_strategy = st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 5)).map(
    lambda grid: (grid[0], 2 * grid[1], 2 * grid[2])
)


@given(grids=st.lists(grid_strategy, min_size=1, max_size=4))
@settings(max_examples=25, deadline=None)
def test_equals_a_naive_dense_version(tower: VisionTower, grids: list[tuple[int, int, int]]) -> None:
    pixels = torch.randn(sum(t * h * w for t, h, w in grids), VISION.patch_dim, dtype=torch.float64)
    found = tower(pixels, torch.tensor(grids))
    assert relative_error(found, naive_features(tower, pixels, grids)) < 1e-10


def test_one_size_needs_no_padding_and_many_sizes_few_calls() -> None:
    same = vision_plan(((1, 8, 8),) * 5, VISION, CPU)
    assert same.windows.equal == (20, 16)
    assert same.frames.equal == (5, 64)
    many = vision_plan(tuple((1, 2 * h, 2 * w) for h in range(1, 9) for w in range(1, 9)), VISION, CPU)
    assert len(many.frames.buckets) <= 8
    slots = sum(bucket.index.numel() for bucket in many.frames.buckets)
    assert slots < 2 * len(many.rows_columns)


def test_a_plan_made_in_inference_mode_serves_training(tower: VisionTower) -> None:
    grids, pixels = torch.tensor([[1, 4, 10], [1, 2, 2]]), torch.randn(44, VISION.patch_dim, dtype=torch.float64)
    vision_plan.cache_clear()
    with torch.inference_mode():
        tower(pixels, grids)
    tower(pixels, grids).sum().backward()
    gradient = tower.patch_embed.proj.weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 0


def test_activation_checkpointing_changes_nothing(tower: VisionTower) -> None:
    grids, pixels = torch.tensor([[1, 4, 6]]), torch.randn(24, VISION.patch_dim, dtype=torch.float64)
    found = []
    for recompute in (False, True):
        tower.zero_grad()
        tower.activation_checkpointing = recompute
        tower(pixels, grids).square().sum().backward()
        found.append([parameter.grad.clone() for parameter in tower.parameters() if parameter.grad is not None])
    tower.activation_checkpointing = False
    assert len(found[0]) == len(list(tower.parameters()))
    assert all(torch.equal(plain, again) for plain, again in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("shape", "grids", "message"),
    [
        ((23, 1176), [[1, 4, 6]], r"pixel_values: shape \(23, 1176\); expected \(24, 1176\) for 1 grids"),
        ((24, 1175), [[1, 4, 6]], r"shape \(24, 1175\); expected \(24, 1176\)"),
        ((24, 1176), [1, 4, 6], r"grid_thw: shape \(3,\); expected \(n, 3\)"),
        ((15, 1176), [[1, 3, 5]], r"grid_thw: \[1, 3, 5\]; expected rows and columns that are multiples of 2"),
    ],
)
def test_pixels_must_match_grids(
    tower: VisionTower, shape: tuple[int, int], grids: list[list[int]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tower(torch.zeros(shape, dtype=torch.float64), torch.tensor(grids))
