"""Images at native resolution: opened, resized to whole merged patches, normalised and cut into rows of patches."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from hybridvl.data.checks import is_finite, require_whole, with_options
from hybridvl.layers.errors import ConfigError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

MAX_ASPECT_RATIO = 200

ImageSource = Image.Image | NDArray[np.uint8] | str | Path | bytes
"""What a sample may hold as an image: PIL, uint8 (H, W) or (H, W, C), a file, or an encoded file's bytes.

C is 1 (grey), 2 (grey and alpha), 3 (RGB) or 4 (RGB and alpha).
"""

IMAGE_OPTIONS = ("min_pixels", "max_pixels")
"""What a message may set for one image, beside the image itself."""

_ORIENTATION = 0x0112  # the EXIF tag that says how a camera was held
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class ImageConfig:
    """How images become rows of patches; the patch sizes must be the vision tower's.

    Attributes:
        patch_size: pixels per patch side.
        temporal_patch_size: frames per patch; a still image is its frame repeated.
        merge_size: patches per side that become one token.
        min_pixels: smaller images are enlarged to this area; None is 4 merged patches (3,136 at 14 x 2).
        max_pixels: larger images are reduced to this area; None is 16,384 merged patches (12,845,056 at 14 x 2).
        mean: subtracted from each channel after scaling to 0..1; one entry makes images greyscale, three RGB.
        std: what each channel is then divided by.
    """

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int | None = None
    max_pixels: int | None = None
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def __post_init__(self) -> None:
        for name in ("patch_size", "temporal_patch_size", "merge_size"):
            require_whole(f"images.{name}", getattr(self, name))
        for name in ("min_pixels", "max_pixels"):
            if getattr(self, name) is not None:
                require_whole(f"images.{name}", getattr(self, name))
        numbers = _numbers(self.mean), _numbers(self.std)
        if len(numbers[0]) not in (1, 3) or len(numbers[1]) != len(numbers[0]) or min(numbers[1]) <= 0:
            raise ConfigError(
                f"images.mean and images.std: {self.mean!r:.80} and {self.std!r:.80}; "
                "expected one number each (greyscale) or three (RGB), std above 0"
            )
        object.__setattr__(self, "mean", numbers[0])
        object.__setattr__(self, "std", numbers[1])
        low, high = self.pixel_limits
        if low > high:
            raise ConfigError(f"images.min_pixels and images.max_pixels: {low} and {high}; expected 0 < min <= max")

    @property
    def channels(self) -> int:
        """Colour channels: 1 or 3."""
        return len(self.mean)

    @property
    def factor(self) -> int:
        """Pixels per side of one merged token; image sides become multiples of it."""
        return self.patch_size * self.merge_size

    @property
    def pixel_limits(self) -> tuple[int, int]:
        """Smallest and largest area of an image in pixels."""
        low = 4 * self.factor**2 if self.min_pixels is None else self.min_pixels
        high = 16384 * self.factor**2 if self.max_pixels is None else self.max_pixels
        return low, high


class ImageProcessor:
    """Turns images into what the vision tower takes, with the numbers of Qwen2-VL's image processor."""

    def __init__(self, config: ImageConfig) -> None:
        self.config = config

    def __call__(
        self, source: ImageSource, place: str = "image", options: Mapping[str, Any] | None = None
    ) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """One image: rows (P, channels * temporal_patch * patch * patch) float32 and its grid (1, rows, columns).

        Args:
            source: the image.
            place: what an error message calls it.
            options: settings for this image alone, of those in IMAGE_OPTIONS.

        Raises:
            ConfigError: the image cannot be read, its sides differ more than 200 times, or an option is none.
        """
        low, high = with_options(self.config, options or {}, IMAGE_OPTIONS, place).pixel_limits
        image = open_image(source, place)
        height, width = smart_resize(image.height, image.width, self.config.factor, low, high, place)
        return self.patches(self.pixels(image, height, width)[None])

    def pixels(self, image: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
        """(height, width, C) uint8: the image in the processor's colours, resized bicubically where it must be.

        What is transparent is seen on white, as `opaque` says.
        """
        image = opaque(image, "RGB" if self.config.channels == 3 else "L")
        if (height, width) != (image.height, image.width):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(image).reshape(height, width, self.config.channels)

    def patches(self, frames: NDArray[np.uint8]) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """Frames (F, H, W, C) uint8, sides multiples of the factor: rows of patches and the grid (t, h, w).

        Rows run over (t, h / merge, w / merge, merge, merge), columns over (channel, frame, y, x). The last frame is
        repeated up to a multiple of the temporal patch size.

        Raises:
            ValueError: the frames are of other colours, or no bytes.
        """
        config, (count, height, width, channels) = self.config, frames.shape
        if channels != config.channels or frames.dtype != np.uint8:
            raise ValueError(f"frames: {channels} channels of {frames.dtype}; expected {config.channels} of uint8")
        steps = -(-count // config.temporal_patch_size)
        grid = (steps, height // config.patch_size, width // config.patch_size)
        cut = frames.reshape(
            count,
            *(grid[1] // config.merge_size, config.merge_size, config.patch_size),
            *(grid[2] // config.merge_size, config.merge_size, config.patch_size),
            channels,
        )
        rows = np.empty(
            (steps, grid[1] * grid[2], channels, config.temporal_patch_size, config.patch_size**2), np.float32
        )
        # Bytes are put in order, not the numbers that they stand for, and a frame that is repeated is looked up once.
        for number, frame in enumerate(cut.transpose(0, 1, 4, 2, 5, 7, 3, 6)):
            step, first = divmod(number, config.temporal_patch_size)
            last = config.temporal_patch_size if number == count - 1 else first + 1
            patches = np.ascontiguousarray(frame).reshape(*rows.shape[1:3], 1, rows.shape[4])
            for channel, table in enumerate(self._tables):
                rows[step, :, channel, first:last] = table.take(patches[:, channel], mode="clip")
        return torch.from_numpy(rows.reshape(math.prod(grid), -1)), grid

    @cached_property
    def _tables(self) -> NDArray[np.float32]:
        # Every pixel is one of 256 values, so that normalising is a look-up. (C, 256)
        values = np.arange(256, dtype=np.float64)[:, None] / 255
        return ((values - np.array(self.config.mean)) / np.array(self.config.std)).astype(np.float32).T.copy()


def opaque(image: Image.Image, mode: str = "RGB") -> Image.Image:
    """An image in a mode without alpha; what is transparent is seen on white.

    qwen-vl-utils and the image processors of transformers from 5.23 on do so with a PIL image that has alpha.
    (transformers' load_image drops the alpha of what it opens.)
    """
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert(mode)


def smart_resize(
    height: int, width: int, factor: int, min_pixels: float, max_pixels: float, place: str = "image"
) -> tuple[int, int]:
    """The nearest (height, width) that are multiples of `factor`, keep the shape and lie within the area's limits.

    The rule of Qwen2-VL's image processor. Raises ConfigError when one side is over 200 times the other.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ConfigError(
            f"{place}: {width}x{height} pixels; expected sides that differ less than {MAX_ASPECT_RATIO} times"
        )
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    if new_height * new_width > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / scale / factor) * factor)
        new_width = max(factor, math.floor(width / scale / factor) * factor)
    elif new_height * new_width < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * scale / factor) * factor
        new_width = math.ceil(width * scale / factor) * factor
    return new_height, new_width


def open_image(source: Any, place: str = "image") -> Image.Image:
    """A loaded PIL image of 8 bits a channel, upright, from what a sample may hold.

    The EXIF orientation is followed wherever there is one, also in a PIL image that was opened elsewhere, as
    transformers' load_image does. Grey images of 16 bits are scaled to 8.

    Raises:
        ConfigError: naming the file, when it is missing, truncated or not an image, or has values of no known range.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, place)
    opened: Any = source
    if isinstance(source, Image.Image):
        name = getattr(source, "filename", "") or "in memory"
    elif isinstance(source, str | Path):
        name = str(source)
    elif isinstance(source, bytes):
        opened, name = io.BytesIO(source), f"of {len(source)} bytes"
    else:
        raise ConfigError(f"{place}: {type(source).__name__}; expected a PIL image, an array, a file or its bytes")
    try:
        image: Image.Image = opened if isinstance(opened, Image.Image) else Image.open(opened)
        image.load()
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{place}: image {name} cannot be read: {error}") from error
    if turn is not None:
        transparency = image.info.get("transparency")
        image = image.transpose(turn)
        # Nothing that says how the camera was held may stay: the image would be turned again.
        image.info = {} if transparency is None else {"transparency": transparency}
    return _eight_bits(image, f"{place}: image {name}")


def _from_array(array: NDArray[Any], place: str) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or not 1 <= channels <= 4 or not array.size:
        raise ConfigError(
            f"{place}: array of {array.dtype} {array.shape}; expected uint8 (H, W) or (H, W, C) with 1 to 4 channels"
        )
    return Image.fromarray(array[:, :, 0] if array.ndim == 3 and channels == 1 else array)


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """The image itself unless its values are of more than 8 bits: PIL would clip those to white."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    # "I" is PIL's mode of 32 bits, in which it opens some files of 16.
    if image.mode == "F" or (image.mode == "I" and not 0 <= values.min() <= values.max() <= 65535):
        raise ConfigError(
            f"{name} has values from {values.min()} to {values.max()} (PIL mode {image.mode}); "
            "expected 8 bits a channel, or grey of 16 bits (0 to 65535)"
        )
    return Image.fromarray(((values.astype(np.int64) * 255 + 32767) // 65535).astype(np.uint8))


def _numbers(values: object) -> tuple[float, ...]:
    """The values if they are a list of numbers, else none."""
    if not isinstance(values, Sequence) or isinstance(values, str) or not all(map(is_finite, values)):
        return ()
    return tuple(values)
