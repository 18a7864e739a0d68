"""Videos: frames chosen at a rate, resized within a budget of pixels, and cut into rows of patches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from hybridvl.data.checks import require_rate, require_whole, with_options
from hybridvl.data.images import ImageProcessor, ImageSource, open_image, smart_resize
from hybridvl.data.video_file import VideoFile
from hybridvl.layers.errors import ConfigError
from hybridvl.models.config import VIDEO_CONVENTIONS

SAMPLINGS = ("ends", "steps")
VIDEO_OPTIONS = ("fps", "frames", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels")
"""What a message may set for one video, beside the video itself."""


@dataclass(frozen=True)
class VideoConfig:
    """Which frames of a video are shown, and how large. The defaults are Qwen2.5-VL's.

    Attributes:
        fps: frames to show a second. For a video given as a list of frames: the rate at which they were taken.
        frames: show just so many frames, whatever the rate; None goes by fps.
        min_frames: shortest clip, as far as the video has frames.
        max_frames: longest clip; longer videos are shown at a lower rate.
        min_pixels: smaller frames are enlarged to this area; None is 128 merged patches (100,352 at 14 x 2).
        max_pixels: larger frames are reduced to this area; None is 768 merged patches (602,112 at 14 x 2).
        total_pixels: area of all steps of the grid together, which lowers max_pixels for long clips; None is 115,200
            merged patches (90,316,800 at 14 x 2).
        sampling: "ends" spreads the frames evenly from the first to the last (qwen-vl-utils), "steps" takes the first
            of each of as many equal stretches (transformers' video processor).
        tokens_per_second: units of temporal position in a second; must be the model's.
        convention: how videos are placed, "v457" or "v523"; must be the model's video_convention.
    """

    fps: float = 2.0
    frames: int | None = None
    min_frames: int = 4
    max_frames: int = 768
    min_pixels: int | None = None
    max_pixels: int | None = None
    total_pixels: int | None = None
    sampling: str = "ends"
    tokens_per_second: float = 2.0
    convention: str = "v457"

    def __post_init__(self) -> None:
        for name in ("fps", "tokens_per_second"):
            require_rate(f"videos.{name}", getattr(self, name))
        for name in ("frames", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels"):
            if getattr(self, name) is not None or name in ("min_frames", "max_frames"):
                require_whole(f"videos.{name}", getattr(self, name))
        if self.min_frames > self.max_frames:
            raise ConfigError(
                f"videos.min_frames and videos.max_frames: {self.min_frames} and {self.max_frames}; expected min <= max"
            )
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ConfigError(
                f"videos.min_pixels and videos.max_pixels: {self.min_pixels} and {self.max_pixels}; expected min <= max"
            )
        if self.sampling not in SAMPLINGS:
            raise ConfigError(f"videos.sampling: {self.sampling!r:.80}; expected one of {', '.join(SAMPLINGS)}")
        if self.convention not in VIDEO_CONVENTIONS:
            known = ", ".join(VIDEO_CONVENTIONS)
            raise ConfigError(f"videos.convention: {self.convention!r:.80}; expected one of {known}")

    def frame_count(self, total: int, rate: float, multiple: int, place: str = "video") -> int:
        """How many of `total` frames at `rate` a second are shown: a multiple of `multiple` where there are as many.

        Raises:
            ConfigError: `frames` is more than the video has.
        """
        if self.frames is not None:
            count = round(self.frames / multiple) * multiple
            if not min(multiple, total) <= count <= total:
                least = min(multiple, total)
                raise ConfigError(f"{place}: frames: {self.frames}; expected {least} to {total}, which is all it has")
            return count
        low = math.ceil(self.min_frames / multiple) * multiple
        high = min(self.max_frames, total) // multiple * multiple
        count = math.floor(min(max(total / rate * self.fps, low), high, total) / multiple) * multiple
        return max(count, min(multiple, total))

    def frame_indices(self, total: int, count: int) -> list[int]:
        """The numbers of `count` frames out of `total`, in ascending order."""
        if self.sampling == "steps":
            return torch.arange(0, total, total / count).int().tolist()[:count]
        # Halves are rounded to even, and the spacing is computed in float32, as the published code does.
        return torch.linspace(0, total - 1, count).round().long().tolist()

    def areas(self, factor: int) -> tuple[int, int, int]:
        """min_pixels, max_pixels and total_pixels where one token stands for factor x factor pixels."""
        area = factor**2
        # Where one limit is given beyond the other's default, the default gives way.
        low = min(128 * area, self.max_pixels or 128 * area) if self.min_pixels is None else self.min_pixels
        high = max(768 * area, int(low * 1.05)) if self.max_pixels is None else self.max_pixels
        return low, high, 115_200 * area if self.total_pixels is None else self.total_pixels

    def pixel_limits(self, factor: int, frames: int, temporal_patch_size: int) -> tuple[float, float]:
        """Smallest and largest area of one frame of a clip in pixels; `factor` is the side of a merged patch."""
        low, high, total = self.areas(factor)
        share = max(total / frames * temporal_patch_size, int(low * 1.05))
        return low, min(high, share)


VideoSource = str | Path | bytes | Sequence[ImageSource] | NDArray[np.uint8]
"""What a sample may hold as a video: a file, an encoded file's bytes, or its frames (a list, or (F, H, W, C) uint8)."""


class VideoProcessor:
    """Turns videos into what the vision tower takes; frames are normalised and cut like images.

    Args:
        images: the image processor of the same tower.
        config: which frames, and how large.
    """

    def __init__(self, images: ImageProcessor, config: VideoConfig | None = None) -> None:
        self.images = images
        self.config = config or VideoConfig()

    def __call__(
        self, source: VideoSource, place: str = "video", options: Mapping[str, Any] | None = None
    ) -> tuple[torch.Tensor, tuple[int, int, int], float]:
        """One video: rows (P, channels * frames * patch * patch) float32, its grid (t, rows, columns), and the seconds
        from one step of the grid to the next.

        Args:
            source: the video; of a list of frames all are shown.
            place: what an error message calls it.
            options: settings for this video alone, of those in VIDEO_OPTIONS.

        Raises:
            ConfigError: the video or a frame cannot be read, or an option is none.
        """
        config = with_options(self.config, options or {}, VIDEO_OPTIONS, place)
        step = self.images.config.temporal_patch_size
        if isinstance(source, str | Path | bytes):
            file = VideoFile(source, place)
            count = config.frame_count(file.frames, file.rate, step, place)
            chosen = file.read(config.frame_indices(file.frames, count))
            frames: Iterator[Image.Image] = (Image.fromarray(frame) for frame in chosen)
            rate = count / file.frames * file.rate
        elif isinstance(source, Sequence | np.ndarray) and len(source):
            count, rate = len(source), config.fps
            frames = (open_image(frame, f"{place} frame {number}") for number, frame in enumerate(source))
        else:
            raise ConfigError(
                f"{place}: {type(source).__name__}; expected a video's file, its bytes or a list of frames"
            )
        rows, grid = self._rows(frames, count, config, place)
        return rows, grid, step / rate

    def _rows(
        self, frames: Iterator[Image.Image], count: int, config: VideoConfig, place: str
    ) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """Patches of the frames, made one step of the grid at a time, so that a long clip is never whole in memory."""
        images, step = self.images.config, self.images.config.temporal_patch_size
        first = next(frames)
        steps = -(-count // step)
        low, high = config.pixel_limits(images.factor, steps * step, step)
        height, width = smart_resize(first.height, first.width, images.factor, low, high, place)
        kept: list[NDArray[np.uint8]] = []
        rows = torch.empty(0)
        done, grid = 0, (0, 0, 0)
        for number, frame in enumerate(chain([first], frames), 1):
            if frame.size != first.size:
                raise ConfigError(
                    f"{place}: frame {number - 1} has {frame.width}x{frame.height} pixels, the first one "
                    f"{first.width}x{first.height}; expected frames of one size"
                )
            kept.append(self.images.pixels(frame, height, width))
            if len(kept) < step and number < count:
                continue
            made, grid = self.images.patches(np.stack(kept))
            if not done:
                rows = torch.empty(steps * len(made), made.shape[1])
            rows[done : done + len(made)] = made
            done += len(made)
            kept.clear()
        return rows, (steps, grid[1], grid[2])
