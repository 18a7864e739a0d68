"""Pages drawn from scans: every digit of a page is enlarged, distorted and inked in one vectorised pass."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

PAPER = 236.0
INK = 24.0
"""Grey levels of clean paper and of full ink."""

MARGIN = 1.15
"""A cell's side over its digit's: the strip of paper that keeps neighbours apart."""


def render_page(
    scans: NDArray[np.float32], numbers: NDArray[np.int64], cell: int, augment: float, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """A page (lines * cell, columns * cell) uint8 with dark digits on light paper.

    Args:
        scans: all scans (N, 8, 8), ink from 0 to 1.
        numbers: (lines, columns), which scan stands where.
        cell: pixels per side of a digit's cell.
        augment: strength of the distortion; at 0 the digits are drawn as they were scanned, on even paper.
        rng: where the distortion is drawn from.
    """
    lines, columns = numbers.shape
    count = lines * columns
    drawn = torch.from_numpy(scans[numbers.reshape(-1)])[:, None]
    drawn = F.grid_sample(drawn, _grid(count, cell, augment, rng), mode="bilinear", align_corners=False)
    ink = drawn.numpy().reshape(lines, columns, cell, cell).transpose(0, 2, 1, 3).reshape(lines * cell, columns * cell)
    if not augment:
        return np.rint(PAPER + (INK - PAPER) * ink).astype(np.uint8)
    # Thinner or thicker strokes, then the scanner's own mistakes: exposure, an uneven lamp and grain.
    strokes = np.exp2(augment * rng.uniform(-0.6, 0.6, (lines, 1, columns, 1))).astype(np.float32)
    ink = np.power(ink.reshape(lines, cell, columns, cell), strokes).reshape(ink.shape)
    paper = PAPER - augment * rng.uniform(-12, 28)
    full = INK + augment * rng.uniform(-12, 56)
    down, across = rng.uniform(-8 * augment, 8 * augment, (2, 2))
    lamp = np.linspace(down[0], down[1], ink.shape[0])[:, None] + np.linspace(across[0], across[1], ink.shape[1])
    grain = rng.standard_normal(ink.shape, dtype=np.float32) * np.float32(augment * rng.uniform(0, 9))
    page = paper + (full - paper) * ink + lamp + grain
    return np.rint(np.clip(page, 0, 255)).astype(np.uint8)


def _grid(count: int, cell: int, augment: float, rng: np.random.Generator) -> torch.Tensor:
    """Where each pixel of each cell is taken from in its scan, (count, cell, cell, 2) as x, y in -1..1."""
    base, smooth = _bases(cell)
    if not augment:
        return base.expand(count, cell, cell, 2)
    draw = rng.uniform(-augment, augment, (6, count)).astype(np.float32)
    angle, shear = 0.22 * draw[0], 0.22 * draw[1]
    scale_x, scale_y = np.exp(0.16 * draw[2]), np.exp(0.16 * draw[3])
    cosine, sine = np.cos(angle), np.sin(angle)
    matrix = np.stack(
        [
            np.stack([cosine * scale_x, (shear - sine) * scale_y], -1),
            np.stack([sine * scale_x, cosine * scale_y], -1),
        ],
        -2,
    )  # (count, 2, 2)
    shift = np.stack([0.16 * draw[4], 0.16 * draw[5]], -1)
    bend = rng.uniform(-0.14 * augment, 0.14 * augment, (count, 9, 2)).astype(np.float32)
    grid = base.reshape(-1, 2) @ torch.from_numpy(matrix).transpose(1, 2) + torch.from_numpy(shift)[:, None]
    grid = grid + smooth @ torch.from_numpy(bend)
    return grid.view(count, cell, cell, 2)


@lru_cache(maxsize=16)
def _bases(cell: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The undistorted grid (cell, cell, 2), and the weights (cell * cell, 9) that spread a 3 x 3 field smoothly."""
    axis = (torch.arange(cell, dtype=torch.float32) * 2 + 1) / cell - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    base = torch.stack([x, y], -1) * MARGIN
    knots = torch.linspace(-1, 1, 3, dtype=torch.float32)
    weights = torch.relu(1 - (axis[:, None] - knots).abs())  # (cell, 3), linear hats
    smooth = torch.einsum("ya,xb->yxab", weights, weights).reshape(cell * cell, 9)
    return base, smooth
