"""Greedy replies of a model to many questions at once: prompts padded on the left, images and videos side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybridvl.models.sampling import Sampling
from hybridvl.models.vlm import VisionLanguageModel
from hybridvl.training.answers import Question


def reply(
    net: VisionLanguageModel, questions: Sequence[Question], stop_ids: tuple[int, ...], max_new_tokens: int
) -> list[list[int]]:
    """The tokens the model writes after each prompt, up to and without the first stop token."""
    length = max(question.prompt.numel() for question in questions)
    first = questions[0].prompt
    tokens = first.new_zeros(len(questions), length)  # (B, T)
    mask = torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)
    for row, question in enumerate(questions):
        tokens[row, length - question.prompt.numel() :] = question.prompt
        mask[row, length - question.prompt.numel() :] = True
    written = net.generate(
        tokens,
        max_new_tokens=max_new_tokens,
        attention_mask=mask,
        pixel_values=_joined([question.pixel_values for question in questions]),
        image_grid_thw=_joined([question.image_grid_thw for question in questions]),
        pixel_values_videos=_joined([question.pixel_values_videos for question in questions]),
        video_grid_thw=_joined([question.video_grid_thw for question in questions]),
        second_per_grid_ts=_joined([question.second_per_grid_ts for question in questions]),
        sampling=Sampling(stop_ids=stop_ids),
    )[:, length:]
    return [_until(row.tolist(), stop_ids) for row in written]


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


def _until(tokens: list[int], stop_ids: tuple[int, ...]) -> list[int]:
    for position, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[:position]
    return tokens
