"""Folders of pictures as sources of frames."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hybridvl.data.checks import require_rate
from hybridvl.data.images import opaque, open_image
from hybridvl.data.sources.frames import FrameSource, Moment
from hybridvl.data.video_stream import Unreadable
from hybridvl.layers.errors import ConfigError


class FolderSource(FrameSource):
    """The pictures of a folder in the order of their names, of which 2.png comes before 10.png.

    Files that are hidden or have no ending of a picture are passed over. Pictures are turned upright as their EXIF data
    say; what is transparent is seen on white.

    Args:
        folder: the folder.
        name: what an error message calls it.
        fps: frames to give a second; None gives every picture.
        rate: pictures a second.

    Raises:
        ConfigError: there are no pictures in it.
    """

    def __init__(self, folder: Path, name: str, fps: float | None, rate: float) -> None:
        super().__init__(name, fps)
        require_rate("rate", rate)
        self._rate = rate
        endings = Image.registered_extensions()
        try:
            found = [file.name for file in folder.iterdir() if not file.name.startswith(".") and file.is_file()]
        except OSError as error:
            raise Unreadable(name, f"it cannot be read: {error.strerror}") from error
        self._files = sorted((file for file in found if Path(file).suffix.lower() in endings), key=_natural)
        self._folder = folder
        if not self._files:
            raise Unreadable(name, "it holds no pictures")

    def _moments(self) -> Iterator[Moment]:
        for number, file in enumerate(self._files):
            yield number / self._rate, partial(self._pixels, number, file)

    def _release(self) -> None:
        """Nothing stays open between two pictures."""

    def _pixels(self, number: int, file: str) -> NDArray[np.uint8]:
        try:
            return np.array(opaque(open_image(self._folder / file, self.name)))
        except ConfigError as error:
            raise ConfigError(f"{error} (after {number} pictures, at second {number / self._rate:.2f})") from error


def _natural(name: str) -> tuple[list[str | int], str]:
    """A key to sort names by: numbers in them count by their value. Texts and numbers take turns, beginning with one
    text; names that differ in leading zeros alone are told apart by the second part."""
    return [int(part) if number % 2 else part for number, part in enumerate(re.split(r"([0-9]+)", name))], name
