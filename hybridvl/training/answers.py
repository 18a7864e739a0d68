"""Answers inside a batch: which tokens form one, the question that asks for it, and how a reply is scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hybridvl.data.chat import IGNORED

MODEL_INPUTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
    "second_per_grid_ts",
    "cu_seqlens",
)
"""Keys of a batch that are handed to the model; the others are for the loss and the scores."""


@dataclass(frozen=True)
class Question:
    """One answer of a batch and everything that comes before it.

    prompt: (T,) int64 tokens before the answer, padding left out.
    answer: (A,) int64 target tokens, the closing token included.
    pixel_values: (P, patch_dim) patches of the prompt's images, or None.
    image_grid_thw: (images, 3) int64, or None.
    kind: what sort of question it is, "" when the data does not say.
    row: number of the sample within the batch.
    """

    prompt: Tensor
    answer: Tensor
    pixel_values: Tensor | None
    image_grid_thw: Tensor | None
    kind: str
    row: int


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a batch that the model takes."""
    return {name: batch[name] for name in MODEL_INPUTS if batch.get(name) is not None}


def real_tokens(batch: Mapping[str, Any]) -> int:
    """Tokens of a batch that are not padding."""
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


def sample_count(batch: Mapping[str, Any]) -> int:
    """Conversations in a batch: rows, or packed segments."""
    packed = batch.get("cu_seqlens")
    return batch["input_ids"].shape[0] if packed is None else packed.numel() - 1


def answers_right(labels: Tensor, hits: Tensor) -> Tensor:
    """(A,) bool: answers all of whose tokens are right, in the order of the rows.

    labels (B, T) int64 as in a batch; hits (N,) bool for the label tokens from position 1 on. An answer is a run of
    neighbouring labels in one row.
    """
    target = labels[:, 1:] != IGNORED  # (B, T - 1)
    begins = target.clone()
    begins[:, 1:] &= ~target[:, :-1]
    owner = begins.flatten().cumsum(0)[target.flatten()] - 1  # (N,) number of the answer each token belongs to
    right = torch.ones(int(begins.sum()), dtype=torch.int64, device=labels.device)
    return right.scatter_reduce(0, owner, hits.long(), "amin").bool()


def split_questions(batch: Mapping[str, Any], image_token_id: int | None, merge: int = 1) -> list[Question]:
    """Every answer of a batch as a question of its own, earlier turns included in its prompt.

    image_token_id: the token that stands for one merged patch; None for a text model.
    merge: patches per such token, that is, spatial_merge_size squared.
    """
    kinds = iter(batch.get("answer_kinds") or ())
    images = _Images(batch, merge)
    questions = []
    for number, (tokens, labels) in enumerate(_samples(batch)):
        is_image = torch.zeros_like(tokens, dtype=torch.bool) if image_token_id is None else tokens == image_token_id
        own = images.take(int(is_image.sum()))
        for start, end in _spans(labels):
            seen = own.within(int(is_image[:start].sum()))
            questions.append(
                Question(tokens[:start], tokens[start:end], seen.pixels, seen.grid, next(kinds, ""), number)
            )
    return questions


@dataclass(frozen=True)
class _Seen:
    """Some images of a batch: their patches, their grids, and how many tokens each became."""

    pixels: Tensor | None
    grid: Tensor | None
    tokens: tuple[int, ...]
    merge: int

    def within(self, count: int) -> _Seen:
        """The first images, those that became the first `count` image tokens."""
        images = _covering(self.tokens, count)
        if not images or self.pixels is None or self.grid is None:
            return _Seen(None, None, (), self.merge)
        return _Seen(self.pixels[: count * self.merge], self.grid[:images], self.tokens[:images], self.merge)


class _Images:
    """The images of a batch, handed out in order to the samples that show them."""

    def __init__(self, batch: Mapping[str, Any], merge: int) -> None:
        self._pixels, self._grid = batch.get("pixel_values"), batch.get("image_grid_thw")
        self._merge = merge
        self._next_image = self._next_patch = 0

    def take(self, tokens: int) -> _Seen:
        """The next images, as many as became `tokens` image tokens."""
        if not tokens or self._pixels is None or self._grid is None:
            return _Seen(None, None, (), self._merge)
        sizes = tuple(int(size) // self._merge for size in self._grid[self._next_image :].prod(-1))
        images = _covering(sizes, tokens)
        patches = slice(self._next_patch, self._next_patch + tokens * self._merge)
        grid = self._grid[self._next_image : self._next_image + images]
        self._next_image, self._next_patch = self._next_image + images, patches.stop
        return _Seen(self._pixels[patches], grid, sizes[:images], self._merge)


def _covering(sizes: tuple[int, ...], total: int) -> int:
    """How many of the first sizes add up to `total`."""
    count = covered = 0
    while covered < total and count < len(sizes):
        covered += sizes[count]
        count += 1
    if covered != total:
        raise ValueError(f"{total} image tokens do not end at an image; the images have {list(sizes)}")
    return count


def _samples(batch: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and labels (T,) of each sample, without padding."""
    tokens, labels = batch["input_ids"], batch["labels"]
    packed, mask = batch.get("cu_seqlens"), batch.get("attention_mask")
    if packed is not None:
        bounds = packed.tolist()
        for start, end in pairwise(bounds):
            yield tokens[0, start:end], labels[0, start:end]
        return
    for row in range(tokens.shape[0]):
        keep = slice(None) if mask is None else mask[row].bool()
        yield tokens[row][keep], labels[row][keep]


def _spans(labels: Tensor) -> list[tuple[int, int]]:
    """(start, end) of each run of labels; position 0 is nobody's answer."""
    spans: list[tuple[int, int]] = []
    previous = False
    for position, label in enumerate(labels.tolist()):
        target = label != IGNORED and position > 0
        if target and not previous:
            spans.append((position, position + 1))
        elif target:
            spans[-1] = (spans[-1][0], position + 1)
        previous = target
    return spans
