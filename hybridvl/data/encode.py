"""From samples to arrays: one conversation with its images becomes token ids, labels and patch rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybridvl.data.chat import ChatFormat, content_parts
from hybridvl.data.images import ImageProcessor
from hybridvl.data.task import Sample
from hybridvl.layers.errors import ConfigError


@dataclass(frozen=True)
class Example:
    """One encoded conversation of T tokens, in arrays that are cheap to send between processes.

    Attributes:
        input_ids: (T,) int64.
        labels: (T,) int64, the token itself inside an answer, else -100.
        pixel_values: (P, patch_dim) float32 rows of all its images; P is 0 without images.
        image_grid_thw: (images, 3) int64.
        kinds: the kind of each answer, "" where the sample names none.
    """

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    pixel_values: NDArray[np.float32]
    image_grid_thw: NDArray[np.int64]
    kinds: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.input_ids)


class SampleEncoder:
    """Encodes samples with one tokenizer and one image processor.

    Args:
        chat: the chat format.
        images: the image processor.
        max_tokens: longest conversation; what follows the last answer may be cut off, answers may not.
        require_answers: refuse a sample without an assistant turn.
    """

    def __init__(
        self, chat: ChatFormat, images: ImageProcessor, max_tokens: int, *, require_answers: bool = True
    ) -> None:
        self.chat = chat
        self.images = images
        self.max_tokens = max_tokens
        self.require_answers = require_answers

    def __call__(self, sample: Sample, place: str = "sample") -> Example:
        """The arrays of one sample; `place` names it in errors.

        Raises:
            ConfigError: malformed messages, an unreadable image, no answer, or one that does not fit `max_tokens`.
        """
        messages = sample["messages"]
        rows, grids = self._images(messages, place)
        merged = self.images.config.merge_size**2
        chat = self.chat.encode(messages, [int(grid.prod()) // merged for grid in grids], place=place)
        end = chat.answers[-1][1] if chat.answers else len(chat.input_ids)
        if self.require_answers and not chat.answers:
            raise ConfigError(f"{place}: no assistant turn; expected at least one answer to learn from")
        if end > self.max_tokens:
            visual = chat.input_ids.count(self.chat.image_token_id)
            raise ConfigError(
                f"{place}: {'its last answer ends at' if chat.answers else 'it has'} {end} tokens ({visual} of them "
                f"image tokens), which does not fit the context data.max_tokens = {self.max_tokens}"
            )
        dim = self.images.config.channels * self.images.config.temporal_patch_size * self.images.config.patch_size**2
        return Example(
            np.array(chat.input_ids[: self.max_tokens], dtype=np.int64),
            np.array(chat.labels[: self.max_tokens], dtype=np.int64),
            np.concatenate(rows) if rows else np.empty((0, dim), dtype=np.float32),
            np.stack(grids) if grids else np.empty((0, 3), dtype=np.int64),
            _kinds(sample, len(chat.answers), place),
        )

    def _images(
        self, messages: list[dict[str, Any]], place: str
    ) -> tuple[list[NDArray[np.float32]], list[NDArray[np.int64]]]:
        rows, grids = [], []
        for number, message in enumerate(messages):
            for part in content_parts(message.get("content"), f"{place}[{number}]"):
                if part["type"] == "image":
                    patches, grid = self.images(part["image"], f"{place}[{number}]")
                    rows.append(patches.numpy())
                    grids.append(np.array(grid, dtype=np.int64))
        return rows, grids


def _kinds(sample: Sample, answers: int, place: str) -> tuple[str, ...]:
    kinds = sample.get("kinds")
    if kinds is None:
        return ("",) * answers
    if len(kinds) != answers:
        raise ConfigError(f"{place}: {len(kinds)} kinds for {answers} answers; expected one for each answer")
    return tuple(kinds)
