"""Inverses of many small unit lower triangular matrices, by blocks, in buffers that are used again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybridvl.layers.ops.chunk_layout import Workspace


class _Level(NamedTuple):
    """From inverse blocks of size h to those of 2h. All tensors are views of buffers.

    Attributes:
        corner: (M, C / 2h, h, h) -Q in the given matrices. left, right: (n, h, h) the blocks R' and P'.
        packed: (n, h, h) a buffer for -Q. half, product: (n, h, h) buffers for -R' Q and -R' Q P'.
        blocks: (n, h, h, 2) both, one after the other. diagonal, below: where they and the product go.
    """

    corner: Tensor
    left: Tensor
    right: Tensor
    packed: Tensor
    half: Tensor
    product: Tensor
    blocks: Tensor
    diagonal: Tensor
    below: Tensor


class UnitLowerInverse:
    """(I - N)^-1 (M, C, C) of the strictly lower triangles of N (M, C, C), C a power of two.

    The inverse of [[P, 0], [Q, R]] is [[P', 0], [-R' Q P', R']]. The inverse blocks of each size lie side by side in a
    buffer, so that products take them as they are; what is zero in a buffer stays so.
    """

    def __init__(self, matrices: Tensor, work: Workspace) -> None:
        """matrices: (M, C, C), the buffer in which every N will stand; read below the diagonal alone."""
        count, size, _ = matrices.shape
        self._levels: list[_Level] = []
        self._pairs = _diagonal_blocks(matrices, 2)[:, :, 1, 0]  # (M, C / 2)
        blocks = work.tensor("inverse 2", count * size // 2, 2, 2).copy_(torch.eye(2))
        self._first = blocks.view(count, -1, 2, 2)[:, :, 1, 0]
        width = 2
        while width < size:
            pairs = blocks.view(-1, 2, width, width)
            number = pairs.shape[0]
            larger = work.tensor(f"inverse {2 * width}", number, 2 * width, 2 * width).zero_()
            grid = larger.view(number, 2, width, 2, width)
            level = _Level(
                corner=_diagonal_blocks(matrices, 2 * width)[:, :, width:, :width],
                left=pairs[:, 1],
                right=pairs[:, 0],
                packed=work.tensor(f"corner {width}", number, width, width),
                half=work.tensor(f"half {width}", number, width, width),
                product=work.tensor(f"product {width}", number, width, width),
                blocks=pairs.permute(0, 2, 3, 1),
                diagonal=grid.diagonal(dim1=1, dim2=3),
                below=grid[:, 1, :, 0],
            )
            self._levels.append(level)
            blocks, width = larger, 2 * width
        self._inverse = blocks

    def solve(self) -> Tensor:
        """The inverses for what stands in the buffer now, in a buffer that the next call overwrites."""
        self._first.copy_(self._pairs)
        for level in self._levels:
            level.packed.view(level.corner.shape).copy_(level.corner)
            torch.bmm(level.left, level.packed, out=level.half)
            torch.bmm(level.half, level.right, out=level.product)
            level.diagonal.copy_(level.blocks)
            level.below.copy_(level.product)
        return self._inverse


def _diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """A view (M, C / size, size, size) of the blocks on the diagonal of (M, C, C)."""
    grid = matrix.unflatten(2, (-1, size)).unflatten(1, (-1, size))  # (M, n, size, n, size)
    return grid.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
