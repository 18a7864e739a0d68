"""The images and videos of a conversation, processed in the order in which its messages show them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hybridvl.data.chat import Message, read_turns
from hybridvl.data.images import ImageProcessor
from hybridvl.data.video import VideoProcessor
from hybridvl.layers.errors import ConfigError

Grid = tuple[int, int, int]


@dataclass
class Visuals:
    """What the images and videos of some conversations become; grids are (frames, rows, columns) of patches.

    Attributes:
        image_rows: for each image, its rows of patches (P, patch_dim) float32.
        image_grids: for each image, its grid.
        video_rows: for each video, its rows.
        video_grids: for each video, its grid.
        seconds: for each video, the seconds from one step of its grid to the next.
    """

    image_rows: list[Tensor] = field(default_factory=list)
    image_grids: list[Grid] = field(default_factory=list)
    video_rows: list[Tensor] = field(default_factory=list)
    video_grids: list[Grid] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def extend(self, other: Visuals) -> None:
        """Append those of a further conversation."""
        self.image_rows += other.image_rows
        self.image_grids += other.image_grids
        self.video_rows += other.video_rows
        self.video_grids += other.video_grids
        self.seconds += other.seconds

    def inputs(self) -> dict[str, Tensor]:
        """What the model takes: pixel_values (P, patch_dim) and image_grid_thw (images, 3) where there are images,
        pixel_values_videos, video_grid_thw and second_per_grid_ts (videos,) float32 where there are videos."""
        made: dict[str, Tensor] = {}
        if self.image_rows:
            made["pixel_values"] = torch.cat(self.image_rows)
            made["image_grid_thw"] = torch.tensor(self.image_grids)
        if self.video_rows:
            made["pixel_values_videos"] = torch.cat(self.video_rows)
            made["video_grid_thw"] = torch.tensor(self.video_grids)
            made["second_per_grid_ts"] = torch.tensor(self.seconds, dtype=torch.float32)
        return made


def read_visuals(messages: Sequence[Message], images: ImageProcessor, videos: VideoProcessor, place: str) -> Visuals:
    """The images and videos of a conversation; ConfigError says in which part of which message one cannot be read."""
    visuals = Visuals()
    for turn in read_turns(messages, place):
        for number, part in enumerate(turn.parts):
            kind, here = part["type"], f"{turn.place}.content[{number}]"
            if kind == "text":
                continue
            if kind not in part:
                raise ConfigError(f'{here}: {kind} part without a value; expected {{"type": "{kind}", "{kind}": ...}}')
            options = {name: value for name, value in part.items() if name not in ("type", kind)}
            if kind == "image":
                rows, grid = images(part[kind], here, options)
                visuals.image_rows.append(rows)
                visuals.image_grids.append(grid)
            else:
                rows, grid, seconds = videos(part[kind], here, options)
                visuals.video_rows.append(rows)
                visuals.video_grids.append(grid)
                visuals.seconds.append(seconds)
    return visuals


def token_counts(grids: Sequence[Grid], merge_size: int) -> list[int]:
    """How many tokens each grid of patches becomes when merge_size x merge_size of them are one token."""
    return [frames * rows * columns // merge_size**2 for frames, rows, columns in grids]
