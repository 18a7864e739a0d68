"""The Qwen2.5-VL vision tower: patches to features in the language model's width, windows and whole frames in turn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hybridvl.layers import ConfigError
from hybridvl.layers.norms import RMSNorm, at_least_float32
from hybridvl.layers.ops.rotary import apply_rotary
from hybridvl.models.block import SwiGLU
from hybridvl.models.config import VisionConfig
from hybridvl.models.vision_plan import Grid, Segments, grid_tuples, vision_plan


class VisionTower(nn.Module):
    """Vision transformer with window attention, 2-D rotary positions and a merger (arXiv 2502.13923, section 2.1)."""

    def __init__(self, config: VisionConfig, out_width: int, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.out_width = out_width
        self.activation_checkpointing = activation_checkpointing
        self.patch_embed = PatchEmbedding(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = Merger(config, out_width)

    def forward(self, pixel_values: Tensor, grid_thw: Tensor, collected: list[Tensor] | None = None) -> Tensor:
        """Features (tokens, D) of the images or videos in order, one per merged unit of patches.

        pixel_values: (P, channels * frames * patch ** 2), rows ordered (t, h / merge, w / merge, merge, merge).
        grid_thw: (n, 3) int64, frames, rows and columns in patches. collected: a list that receives the output
        (P, width) of every block, in window order. Raises ConfigError when the two do not fit together.
        """
        grids = grid_tuples(grid_thw)
        self._check(pixel_values, grids)
        if not grids:
            return self.patch_embed.proj.weight.new_zeros(0, self.out_width)
        plan = vision_plan(grids, self.config, pixel_values.device)
        x = self.patch_embed(pixel_values)  # (P, width)
        x = x.unflatten(0, (-1, self.config.spatial_merge_size**2))[plan.order].flatten(0, 1)
        rotary = self._rotary(plan.rows_columns, x.dtype)
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for number, block in enumerate(self.blocks):
            segments = plan.frames if number in self.config.full_attention_blocks else plan.windows
            x = checkpoint(block, x, rotary, segments, use_reentrant=False) if recompute else block(x, rotary, segments)
            if collected is not None:
                collected.append(x)
        return self.merger(x)[plan.inverse]

    def _rotary(self, rows_columns: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin (1, P, K): half of the frequencies turn with the row, half with the column."""
        half = self.config.head_dim // 2
        exact = at_least_float32(dtype)
        exponents = torch.arange(0, half, 2, device=rows_columns.device).to(exact) / half
        frequencies = 1.0 / self.config.rope_theta**exponents  # (K / 4,)
        angles = (rows_columns.to(exact)[..., None] * frequencies).flatten(1)  # (P, K / 2)
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(0)
        return angles.cos(), angles.sin()

    def _check(self, pixel_values: Tensor, grids: tuple[Grid, ...]) -> None:
        merge = self.config.spatial_merge_size
        for grid in grids:
            if min(grid) < 1 or grid[1] % merge or grid[2] % merge:
                raise ConfigError(f"grid_thw: {list(grid)}; expected rows and columns that are multiples of {merge}")
        patches = sum(t * h * w for t, h, w in grids)
        wanted = (patches, self.config.patch_dim)
        if tuple(pixel_values.shape) != wanted:
            raise ConfigError(
                f"pixel_values: shape {tuple(pixel_values.shape)}; expected {wanted} for {len(grids)} grids"
            )


class PatchEmbedding(nn.Module):
    """A linear map of flattened patches; its weight keeps the shape of the equivalent convolution."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.channels, config.width, kernel, stride=kernel, bias=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(P, patch_dim) to (P, width)."""
        return F.linear(pixel_values.to(self.proj.weight.dtype), self.proj.weight.flatten(1))


class VisionBlock(nn.Module):
    """Norm, bidirectional attention within segments, norm, SwiGLU with biases."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.width, config.norm_eps)
        self.attn = VisionAttention(config.width, config.heads)
        self.norm2 = RMSNorm(config.width, config.norm_eps)
        self.mlp = SwiGLU(config.width, config.mlp_width, bias=True)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], segments: Segments) -> Tensor:
        """x (P, width) to (P, width)."""
        x = x + self.attn(self.norm1(x), rotary, segments)
        return x + self.mlp(self.norm2(x))


class VisionAttention(nn.Module):
    """Multi-head attention in which every patch sees all patches of its segment."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], segments: Segments) -> Tensor:
        """x (P, width) to (P, width)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)  # (P, H, K)
        q, k = (apply_rotary(heads.unsqueeze(0), *rotary).squeeze(0) for heads in (q, k))
        return self.proj(_attend(q, k, v, segments).flatten(1))


class Merger(nn.Module):
    """Joins the patches of each merged unit into one feature of the language model's width."""

    def __init__(self, config: VisionConfig, out_width: int) -> None:
        super().__init__()
        joined = config.width * config.spatial_merge_size**2
        self.joined = joined
        self.ln_q = RMSNorm(config.width, config.norm_eps)
        self.mlp = nn.Sequential(nn.Linear(joined, joined), nn.GELU(), nn.Linear(joined, out_width))

    def forward(self, x: Tensor) -> Tensor:
        """x (P, width) to (P / merge ** 2, out_width)."""
        return self.mlp(self.ln_q(x).view(-1, self.joined))


def _attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """q, k, v (P, H, K) to (P, H, K)."""
    if segments.equal is not None:
        q, k, v = (x.unflatten(0, segments.equal).transpose(1, 2) for x in (q, k, v))  # (S, H, L, K)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)
    pieces = []
    for bucket in segments.buckets:
        qs, ks, vs = (x[bucket.index].transpose(1, 2) for x in (q, k, v))  # (S, H, L, K)
        o = F.scaled_dot_product_attention(qs, ks, vs, attn_mask=bucket.mask).transpose(1, 2).flatten(0, 1)
        pieces.append(o if bucket.kept is None else o[bucket.kept])
    return torch.cat(pieces)[segments.restore]
