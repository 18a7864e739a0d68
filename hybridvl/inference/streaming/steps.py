"""Frames made ready for the vision tower, one step of its grid at a time; may run in a thread of its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hybridvl.data.images import ImageProcessor, ImageSource, open_image, smart_resize
from hybridvl.data.video import VideoProcessor
from hybridvl.layers.errors import ConfigError


@dataclass(frozen=True)
class FrameStep:
    """What the vision tower takes at once.

    rows: (P, channels * temporal_patch * patch * patch) float32. grid: (1, rows, columns) of patches. time: seconds, of
    its first frame.
    """

    rows: Tensor
    grid: tuple[int, int, int]
    time: float


class StepMaker:
    """Frames resized to whole merged patches within the limits of an area, normalised and cut into rows of patches.

    Args:
        images: the image processor of the tower.
        limits: smallest and largest area of a frame in pixels.
        together: frames that make one step: 1, each repeated as often as a patch of the tower is long, as still
            pictures are; or as many as a patch of the tower is long, as in video files.
    """

    def __init__(self, images: ImageProcessor, limits: tuple[float, float], together: int = 1) -> None:
        allowed = sorted({1, images.config.temporal_patch_size})
        if together not in allowed:
            raise ConfigError(f"together: {together!r}; expected {' or '.join(map(str, allowed))} frames a step")
        if not 0 < limits[0] <= limits[1]:
            raise ConfigError(f"min_pixels and max_pixels: {limits[0]} and {limits[1]}; expected 0 < min <= max")
        self.images = images
        self.limits = limits
        self.together = together
        self._kept: list[NDArray[np.uint8]] = []
        self._time = 0.0

    def add(self, frame: ImageSource, time: float, place: str = "frame") -> list[FrameStep]:
        """Take a frame; the steps that are whole now: none or one, two where the frame's size is a new one.

        Raises:
            ConfigError: the frame cannot be read.
        """
        image = open_image(frame, place)
        height, width = smart_resize(image.height, image.width, self.images.config.factor, *self.limits, place)
        pixels = self.images.pixels(image, height, width)
        made = self.rest() if self._kept and self._kept[0].shape != pixels.shape else []
        if not self._kept:
            self._time = time
        self._kept.append(pixels)
        return [*made, *self.rest()] if len(self._kept) == self.together else made

    def rest(self) -> list[FrameStep]:
        """The step that is not whole yet, if there is one, its last frame repeated."""
        if not self._kept:
            return []
        rows, grid = self.images.patches(np.stack(self._kept))
        self._kept = []
        return [FrameStep(rows, grid, self._time)]

    def copy(self) -> StepMaker:
        """One that goes on by itself."""
        made = StepMaker(self.images, self.limits, self.together)
        made._kept, made._time = list(self._kept), self._time
        return made

    def waiting(self) -> tuple[list[NDArray[np.uint8]], float]:
        """Frames (h, w, C) of a step that is not whole yet, and the time of the first; `wait_again` takes them back."""
        return list(self._kept), self._time

    def wait_again(self, frames: list[NDArray[np.uint8]], time: float) -> None:
        """Go on from what `waiting` gave."""
        self._kept, self._time = list(frames), time


def frame_limits(images: ImageProcessor, videos: VideoProcessor, layout: str) -> tuple[float, float]:
    """Smallest and largest area of a frame of a stream: an image's, or that of a frame of a short video."""
    if layout == "images":
        return images.config.pixel_limits
    low, high, _ = videos.config.areas(images.config.factor)
    return low, high
