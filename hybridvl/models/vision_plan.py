"""Where the patches of a batch of images and videos lie, and which of them attend to which: index tensors only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from hybridvl.layers import ConfigError
from hybridvl.models.config import VisionConfig

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Bucket:
    """Segments of similar length, padded to the longest of them.

    index: (S, L) int64, the patch in every slot. mask: (S, 1, 1, L) bool, True at patches, False at padding; None
    when the segments are equally long. kept: indices into the flattened (S * L) slots of the patches; None likewise.
    """

    index: Tensor
    mask: Tensor | None
    kept: Tensor | None


@dataclass(frozen=True)
class Segments:
    """A cut of the patches into segments that attend within themselves.

    equal: (S, L) when all segments are equally long, so that a reshape does; otherwise the buckets. restore: (P,)
    int64, brings the concatenated outputs of the buckets back into the order of the patches.
    """

    equal: tuple[int, int] | None
    buckets: tuple[Bucket, ...] = ()
    restore: Tensor | None = None


@dataclass(frozen=True)
class VisionPlan:
    """Everything about a batch of grids that does not depend on pixels.

    Patches are processed in window order: frame by frame, and within a frame window by window. order: (M,) int64, the
    merged units (M = P / merge ** 2) in window order; inverse: (M,) int64, its inverse. rows_columns: (P, 2) int64,
    place of every patch in its frame, in window order. windows, frames: the two ways to attend.
    """

    order: Tensor
    inverse: Tensor
    rows_columns: Tensor
    windows: Segments
    frames: Segments


@lru_cache(maxsize=64)
def vision_plan(grids: tuple[Grid, ...], config: VisionConfig, device: torch.device) -> VisionPlan:
    """The plan for grids of (frames, rows, columns) in patches; rows and columns are multiples of the merge size."""
    # Tensors made in inference mode could not be saved for a later backward pass, and these are kept. They also must
    # not follow a device set by the caller.
    with torch.inference_mode(False), torch.device("cpu"):
        unit = config.spatial_merge_size**2
        layouts = [_frame_layout(rows, columns, config) for _, rows, columns in grids]
        orders, places, windows, frames, done = [], [], [], [], 0
        for (count, rows, columns), layout in zip(grids, layouts, strict=True):
            units = rows * columns // unit
            offsets = done + units * torch.arange(count)
            orders.append((offsets[:, None] + layout.order).flatten())
            places.append(layout.rows_columns.repeat(count, 1))
            windows.append(layout.window_lengths.repeat(count))
            frames.append(torch.full((count,), rows * columns))
            done += units * count
        order = torch.cat(orders)
        plan = VisionPlan(
            order, order.argsort(), torch.cat(places), _segments(torch.cat(windows)), _segments(torch.cat(frames))
        )
        return plan if device.type == "cpu" else _moved(plan, device)


@dataclass(frozen=True)
class _FrameLayout:
    order: Tensor  # (units,) merged units of one frame in window order
    rows_columns: Tensor  # (patches, 2), in window order
    window_lengths: Tensor  # (windows,) patches per window


@lru_cache(maxsize=1024)
def _frame_layout(rows: int, columns: int, config: VisionConfig) -> _FrameLayout:
    merge, side = config.spatial_merge_size, config.window_size // config.merged_patch_size
    unit_row, unit_column = (
        axis.flatten()
        for axis in torch.meshgrid(torch.arange(rows // merge), torch.arange(columns // merge), indexing="ij")
    )
    across = -(-(columns // merge) // side)
    window = (unit_row // side) * across + unit_column // side
    order = window.argsort(stable=True)
    inner_row, inner_column = (
        axis.flatten() for axis in torch.meshgrid(torch.arange(merge), torch.arange(merge), indexing="ij")
    )
    patch_rows = unit_row[order, None] * merge + inner_row  # (units, merge ** 2)
    patch_columns = unit_column[order, None] * merge + inner_column
    rows_columns = torch.stack((patch_rows.flatten(), patch_columns.flatten()), dim=1)
    return _FrameLayout(order, rows_columns, window.bincount() * merge**2)


def _segments(lengths: Tensor) -> Segments:
    """Bucket segments by the next power of two of their length: few calls, and less than half of any is padding."""
    count, longest = len(lengths), int(lengths.max())
    if bool((lengths == longest).all()):
        return Segments((count, longest))
    starts = lengths.cumsum(0) - lengths
    size = torch.log2(lengths.double()).ceil()
    buckets, written = [], []
    for value in size.unique():
        chosen = (size == value).nonzero().squeeze(1)
        lasts = (starts[chosen] + lengths[chosen] - 1)[:, None]
        index = starts[chosen, None] + torch.arange(int(lengths[chosen].max()))
        real = index <= lasts
        index = torch.minimum(index, lasts)
        written.append(index[real])
        whole = bool(real.all())
        kept = None if whole else real.flatten().nonzero().squeeze(1)
        buckets.append(Bucket(index, None if whole else real[:, None, None, :], kept))
    return Segments(None, tuple(buckets), torch.cat(written).argsort())


def _moved(plan: VisionPlan, device: torch.device) -> VisionPlan:
    def segments(cut: Segments) -> Segments:
        buckets = tuple(
            Bucket(
                b.index.to(device),
                None if b.mask is None else b.mask.to(device),
                None if b.kept is None else b.kept.to(device),
            )
            for b in cut.buckets
        )
        return Segments(cut.equal, buckets, None if cut.restore is None else cut.restore.to(device))

    return VisionPlan(
        plan.order.to(device),
        plan.inverse.to(device),
        plan.rows_columns.to(device),
        segments(plan.windows),
        segments(plan.frames),
    )


def grid_tuples(grid_thw: Tensor | Sequence[Sequence[int]], name: str = "grid_thw") -> tuple[Grid, ...]:
    """The rows of grid_thw (n, 3) as tuples of ints; any other shape is a ConfigError that calls it `name`."""
    if not isinstance(grid_thw, Tensor) and len({len(row) for row in grid_thw}) > 1:
        raise ConfigError(f"{name}: {[*grid_thw]}; expected three numbers, frames, rows and columns, of each")
    shape = tuple(torch.as_tensor(grid_thw).shape)
    if shape[1:] != (3,) and shape != (0,):
        raise ConfigError(f"{name}: shape {shape}; expected (n, 3), frames, rows and columns of each")
    rows = grid_thw.tolist() if isinstance(grid_thw, Tensor) else grid_thw
    return tuple((int(t), int(h), int(w)) for t, h, w in rows)
