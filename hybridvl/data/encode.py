"""From samples to arrays: one conversation with its images and videos becomes token ids, labels and patch rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hybridvl.data.chat import ChatFormat
from hybridvl.data.images import ImageProcessor
from hybridvl.data.task import Sample
from hybridvl.data.video import VideoProcessor
from hybridvl.data.visuals import Grid, read_visuals, token_counts
from hybridvl.layers.errors import ConfigError


class TooLong(ConfigError):
    """A conversation whose answers do not fit the context."""


@dataclass(frozen=True)
class Example:
    """One encoded conversation of T tokens, in arrays that are cheap to send between processes.

    Attributes:
        input_ids: (T,) int64.
        labels: (T,) int64, the token itself inside an answer, else -100.
        pixel_values: (P, patch_dim) float32 rows of all its images; P is 0 without images.
        image_grid_thw: (images, 3) int64.
        pixel_values_videos: (P, patch_dim) float32 rows of all its videos.
        video_grid_thw: (videos, 3) int64.
        second_per_grid_ts: (videos,) float32 seconds from one step of a video's grid to the next.
        kinds: the kind of each answer, "" where the sample names none.
    """

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    pixel_values: NDArray[np.float32]
    image_grid_thw: NDArray[np.int64]
    pixel_values_videos: NDArray[np.float32]
    video_grid_thw: NDArray[np.int64]
    second_per_grid_ts: NDArray[np.float32]
    kinds: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.input_ids)


class SampleEncoder:
    """Encodes samples with one tokenizer and one processor each for images and videos.

    Args:
        chat: the chat format.
        images: the image processor.
        videos: the video processor; None takes Qwen2.5-VL's settings.
        max_tokens: longest conversation; what follows the last answer may be cut off, answers may not.
        require_answers: refuse a sample without an assistant turn.
    """

    def __init__(
        self,
        chat: ChatFormat,
        images: ImageProcessor,
        max_tokens: int,
        *,
        videos: VideoProcessor | None = None,
        require_answers: bool = True,
    ) -> None:
        self.chat = chat
        self.images = images
        self.videos = videos or VideoProcessor(images)
        self.max_tokens = max_tokens
        self.require_answers = require_answers

    def __call__(self, sample: Sample, place: str = "sample") -> Example:
        """The arrays of one sample; `place` names it in errors.

        Raises:
            TooLong: an answer that does not fit `max_tokens`.
            ConfigError: malformed messages, an unreadable image, or no answer.
        """
        messages = sample["messages"]
        visuals = read_visuals(messages, self.images, self.videos, place)
        merge = self.images.config.merge_size
        counts = token_counts(visuals.image_grids, merge), token_counts(visuals.video_grids, merge)
        chat = self.chat.encode(messages, *counts, place=place)
        end = chat.answers[-1][1] if chat.answers else len(chat.input_ids)
        if self.require_answers and not chat.answers:
            raise ConfigError(f"{place}: no assistant turn; expected at least one answer to learn from")
        if end > self.max_tokens:
            shown = f"{sum(counts[0])} of them image tokens" + (f", {sum(counts[1])} video tokens" * any(counts[1]))
            raise TooLong(
                f"{place}: {'its last answer ends at' if chat.answers else 'it has'} {end} tokens ({shown}), "
                f"which does not fit the context data.max_tokens = {self.max_tokens}"
            )
        return Example(
            np.array(chat.input_ids[: self.max_tokens], dtype=np.int64),
            np.array(chat.labels[: self.max_tokens], dtype=np.int64),
            self._rows(visuals.image_rows),
            _grids(visuals.image_grids),
            self._rows(visuals.video_rows),
            _grids(visuals.video_grids),
            np.array(visuals.seconds, dtype=np.float32),
            _kinds(sample, len(chat.answers), place),
        )

    def _rows(self, parts: list[Tensor]) -> NDArray[np.float32]:
        config = self.images.config
        dim = config.channels * config.temporal_patch_size * config.patch_size**2
        return np.concatenate([part.numpy() for part in parts]) if parts else np.empty((0, dim), dtype=np.float32)


def _grids(grids: list[Grid]) -> NDArray[np.int64]:
    return np.array(grids, dtype=np.int64).reshape(-1, 3)


def _kinds(sample: Sample, answers: int, place: str) -> tuple[str, ...]:
    kinds = sample.get("kinds")
    if kinds is None:
        return ("",) * answers
    if len(kinds) != answers:
        raise ConfigError(f"{place}: {len(kinds)} kinds for {answers} answers; expected one for each answer")
    return tuple(kinds)
