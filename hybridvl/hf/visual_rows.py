"""Images and videos repeated along with the rows of tokens that refer to them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hybridvl.layers import ConfigError
from hybridvl.models.config import ModelConfig

_KINDS = (
    ("image", "image_token_id", "pixel_values", "image_grid_thw", ()),
    ("video", "video_token_id", "pixel_values_videos", "video_grid_thw", ("second_per_grid_ts",)),
)


def repeat_visuals(
    config: ModelConfig, input_ids: Tensor, visuals: Mapping[str, Tensor | None], times: int
) -> dict[str, Tensor | None]:
    """The model's visual inputs by name, as needed when every row of input_ids (B, T) is repeated `times` times.

    Images lie in one long list, in the order of the rows. ConfigError when the rows' visual tokens do not add up to
    whole images.
    """
    repeated = dict(visuals)
    for kind, token, pixels, grid, beside in _KINDS:
        grids = visuals.get(grid)
        if grids is None:
            continue
        order = _repeated_order(kind, input_ids == getattr(config, token), _sizes(config, grids), times)
        repeated[grid] = grids[order]
        for name in beside:
            values = visuals.get(name)
            repeated[name] = None if values is None else torch.as_tensor(values)[order]
        rows = visuals.get(pixels)
        if rows is not None:
            parts = rows.split(grids.prod(1).tolist())
            repeated[pixels] = torch.cat([parts[index] for index in order])
    return repeated


def _sizes(config: ModelConfig, grids: Tensor) -> list[int]:
    """Tokens of every image or video."""
    merged = 1 if config.vision is None else config.vision.spatial_merge_size**2
    return (grids.prod(1) // merged).tolist()


def _repeated_order(kind: str, visual: Tensor, sizes: list[int], times: int) -> list[int]:
    """Numbers of the images in the order in which the repeated rows refer to them."""
    order: list[int] = []
    first = 0
    for tokens in visual.sum(1).tolist():
        last, found = first, 0
        while found < tokens and last < len(sizes):
            found += sizes[last]
            last += 1
        if found != tokens:
            raise ConfigError(f"input_ids: a row's {tokens} {kind} tokens are not those of whole {kind}s")
        order += [*range(first, last)] * times
        first = last
    return order
