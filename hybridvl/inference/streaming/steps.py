"""Frames made ready for the vision tower, one step of its grid at a time; may run in a thread of its own."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hybridvl.data.checks import is_finite
from hybridvl.data.images import ImageProcessor, ImageSource, open_image, smart_resize
from hybridvl.data.video import VideoProcessor
from hybridvl.layers.errors import ConfigError

_LONGEST = 1e12  # seconds


@dataclass(frozen=True)
class FrameStep:
    """What the vision tower takes at once.

    rows: (P, channels * temporal_patch * patch * patch) float32. grid: (1, rows, columns) of patches. time: seconds, of
    its first frame.
    """

    rows: Tensor
    grid: tuple[int, int, int]
    time: float


@dataclass(frozen=True)
class ReadyFrame:
    """A frame in its final size; where it is a step by itself, cut already.

    pixels: (h, w, C) uint8. rows, grid: as in `FrameStep`; None where it waits for others.
    """

    pixels: NDArray[np.uint8]
    rows: Tensor | None = None
    grid: tuple[int, int, int] = (0, 0, 0)


class StepMaker:
    """Frames resized to whole merged patches within the limits of an area, normalised and cut into rows of patches.

    Args:
        images: the image processor of the tower.
        limits: smallest and largest area of a frame in pixels.
        together: frames that make one step: 1, each repeated as often as a patch of the tower is long, as still
            pictures are; or as many as a patch of the tower is long, as in video files.

    Attributes:
        last: time of the last frame, in seconds; None before the first one.
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
        self.last: float | None = None
        self._kept: list[NDArray[np.uint8]] = []
        self._time = 0.0

    def ready(self, frame: ImageSource, place: str = "frame") -> ReadyFrame:
        """Make a frame ready; changes nothing here, so that a thread may do it ahead of `take`.

        Raises:
            ConfigError: the frame cannot be read.
        """
        image = open_image(frame, place)
        height, width = smart_resize(image.height, image.width, self.images.config.factor, *self.limits, place)
        pixels = self.images.pixels(image, height, width)
        return ReadyFrame(pixels, *self.images.patches(pixels[None])) if self.together == 1 else ReadyFrame(pixels)

    def take(self, frame: ReadyFrame, time: float) -> list[FrameStep]:
        """Take the next frame; the steps that are whole now: none or one, two where the frame's size is a new one.

        Raises:
            ConfigError: the time is before that of the last frame; then the frame has not been taken.
        """
        require_time(time, self.last)
        self.last = time
        if frame.rows is not None:
            return [FrameStep(frame.rows, frame.grid, time)]
        made = self.rest() if self._kept and self._kept[0].shape != frame.pixels.shape else []
        if not self._kept:
            self._time = time
        self._kept.append(frame.pixels)
        return [*made, *self.rest()] if len(self._kept) >= self.together else made

    def rest(self) -> list[FrameStep]:
        """The step that is not whole yet, if there is one, its last frame repeated."""
        if not self._kept:
            return []
        rows, grid = self.images.patches(np.stack(self._kept))
        self._kept = []
        return [FrameStep(rows, grid, self._time)]

    def copy(self) -> StepMaker:
        """One that goes on by itself."""
        made = copy.copy(self)
        made._kept = list(self._kept)
        return made

    def waiting(self) -> tuple[list[NDArray[np.uint8]], float]:
        """Frames (h, w, C) of a step that is not whole yet, and the time of the first; `wait_again` takes them back."""
        return list(self._kept), self._time

    def wait_again(self, frames: list[NDArray[np.uint8]], time: float, last: float | None) -> None:
        """Go on from what `waiting` and `last` gave.

        Raises:
            ConfigError: these cannot be frames that wait.
        """
        side = self.images.config.factor
        shapes = {frame.shape for frame in frames}
        whole = all(len(shape) == 3 and not shape[0] % side and not shape[1] % side for shape in shapes)
        if len(frames) >= self.together or len(shapes) > 1 or not whole or any(f.dtype != np.uint8 for f in frames):
            raise ConfigError(f"{len(frames)} frames of {sorted(map(str, shapes))}; expected fewer than a step has")
        self._kept, self._time, self.last = list(frames), time, last


def require_time(time: float, last: float | None) -> None:
    """Raise ConfigError unless a frame can come at this time after one at `last`, both in seconds."""
    if not is_finite(time) or abs(time) > _LONGEST or (last is not None and time < last):
        since = f" of at most {_LONGEST:g}" if last is None else f" of at least {last:g}, the time of the frame before"
        raise ConfigError(f"time: {time!r}; expected seconds{since}")


def frame_limits(images: ImageProcessor, videos: VideoProcessor, layout: str) -> tuple[float, float]:
    """Smallest and largest area of a frame of a stream: an image's, or that of a frame of a short video."""
    if layout == "images":
        return images.config.pixel_limits
    low, high, _ = videos.config.areas(images.config.factor)
    return low, high
