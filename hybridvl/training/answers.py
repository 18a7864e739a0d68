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
    pixel_values_videos, video_grid_thw: the same of the prompt's videos, or None.
    second_per_grid_ts: (videos,) float32, or None.
    """

    prompt: Tensor
    answer: Tensor
    pixel_values: Tensor | None
    image_grid_thw: Tensor | None
    kind: str
    row: int
    pixel_values_videos: Tensor | None = None
    video_grid_thw: Tensor | None = None
    second_per_grid_ts: Tensor | None = None


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


def split_questions(
    batch: Mapping[str, Any], image_token_id: int | None, merge: int = 1, video_token_id: int | None = None
) -> list[Question]:
    """Every answer of a batch as a question of its own, earlier turns included in its prompt.

    image_token_id, video_token_id: the tokens that stand for one merged patch; None for a text model.
    merge: patches per such token, that is, spatial_merge_size squared.
    """
    kinds = iter(batch.get("answer_kinds") or ())
    questions = []
    parts = _parts(batch, image_token_id, merge, video_token_id)
    for number, (tokens, labels, own_images, own_videos) in enumerate(parts):
        for start, end in _spans(labels):
            prompt = tokens[:start]
            pixels, grid, _ = own_images.within(prompt)
            clip, clip_grid, seconds = own_videos.within(prompt)
            questions.append(
                Question(*(prompt, tokens[start:end], pixels, grid, next(kinds, ""), number), clip, clip_grid, seconds)
            )
    return questions


def sample_parts(
    batch: Mapping[str, Any], image_token_id: int | None, merge: int = 1, video_token_id: int | None = None
) -> Iterator[tuple[Tensor | None, ...]]:
    """Everything that each sample of a batch consists of, however it is batched, in order.

    Tokens (T,) and labels (T,), padding left out, the pixels and grids of its images, None without any, and the pixels,
    grids and seconds of its videos. The other arguments are those of `split_questions`.
    """
    for tokens, labels, images, videos in _parts(batch, image_token_id, merge, video_token_id):
        yield tokens, labels, images.pixels, images.grid, videos.pixels, videos.grid, videos.seconds


@dataclass
class _Visuals:
    """The images, or the videos, of a batch or of one of its samples, in order.

    token: the token that stands for `merge` patches; None when there are none.
    """

    token: int | None
    merge: int
    pixels: Tensor | None
    grid: Tensor | None
    seconds: Tensor | None = None

    def take(self, tokens: Tensor) -> _Visuals:
        """Hand out the first of them, those that the tokens of the next sample show."""
        taken = _Visuals(self.token, self.merge, *self.within(tokens))
        if taken.pixels is not None and taken.grid is not None and self.pixels is not None and self.grid is not None:
            self.pixels, self.grid = self.pixels[len(taken.pixels) :], self.grid[len(taken.grid) :]
            self.seconds = None if self.seconds is None else self.seconds[len(taken.grid) :]
        return taken

    def within(self, tokens: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Pixels, grids and seconds of the first of them, those that these tokens show; None without any."""
        count = 0 if self.token is None else int((tokens == self.token).sum())
        if not count or self.pixels is None or self.grid is None:
            return None, None, None
        number = _covering(tuple(int(size) // self.merge for size in self.grid.prod(-1)), count)
        seconds = None if self.seconds is None else self.seconds[:number]
        return self.pixels[: count * self.merge], self.grid[:number], seconds


def _parts(
    batch: Mapping[str, Any], image_token_id: int | None, merge: int, video_token_id: int | None
) -> Iterator[tuple[Tensor, Tensor, _Visuals, _Visuals]]:
    """Tokens, labels, images and videos of each sample."""
    images = _Visuals(image_token_id, merge, batch.get("pixel_values"), batch.get("image_grid_thw"))
    videos = _Visuals(
        *(video_token_id, merge, batch.get("pixel_values_videos"), batch.get("video_grid_thw")),
        batch.get("second_per_grid_ts"),
    )
    for tokens, labels in _samples(batch):
        yield tokens, labels, images.take(tokens), videos.take(tokens)


def _covering(sizes: tuple[int, ...], total: int) -> int:
    """How many of the first sizes add up to `total`."""
    count = covered = 0
    while covered < total and count < len(sizes):
        covered += sizes[count]
        count += 1
    if covered != total:
        raise ValueError(f"{total} visual tokens do not end at an image or video; those have {list(sizes)}")
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
