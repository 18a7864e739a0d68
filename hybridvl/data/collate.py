"""Batches: examples padded to one length, or packed end to end into one row with `cu_seqlens`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hybridvl.data.chat import IGNORED, ChatFormat
from hybridvl.data.encode import Example
from hybridvl.data.video import VideoConfig
from hybridvl.models.positions import PositionRules, VisualGrids, rope_positions

Batch = dict[str, Any]
"""What the model and its training take: input_ids, labels (B, T) int64; position_ids (3, B, T) int64; attention_mask
(B, T) bool or cu_seqlens (N + 1,) int64; pixel_values (P, patch_dim) float32 and image_grid_thw (images, 3) int64 where
there are images; pixel_values_videos, video_grid_thw and second_per_grid_ts (videos,) float32 where there are videos;
answer_kinds, a string for each answer in order."""

_VISUALS = {
    "image_grid_thw": ("pixel_values", "image_grid_thw"),
    "video_grid_thw": ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts"),
}
"""What a batch holds of images and of videos, by the part that says whether there are any."""


class Collator:
    """Makes batches of examples.

    A label is the target of its own position, -100 where there is none; the first label of every segment is -100, so
    that a loss that shifts by one never crosses from one packed sample to the next.

    Args:
        chat: the chat format, for its token ids.
        merge_size: patches per side that become one token.
        packing: one row of all examples end to end, instead of a row for each.
        videos: where in time the steps of videos stand; None takes Qwen2.5-VL's settings.
    """

    def __init__(
        self, chat: ChatFormat, merge_size: int, *, packing: bool = False, videos: VideoConfig | None = None
    ) -> None:
        videos = videos or VideoConfig()
        self.packing = packing
        self._pad = chat.pad_token_id
        self._rules = PositionRules(
            image_token_id=chat.image_token_id,
            video_token_id=chat.video_token_id,
            merge_size=merge_size,
            tokens_per_second=videos.tokens_per_second,
            video_convention=videos.convention,
        )

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """One batch of at least one example."""
        batch = self._packed(examples) if self.packing else self._padded(examples)
        for name, parts in _VISUALS.items():
            if any(len(getattr(example, name)) for example in examples):
                for part in parts:
                    batch[part] = torch.from_numpy(np.concatenate([getattr(example, part) for example in examples]))
        batch["position_ids"] = rope_positions(
            self._rules,
            batch["input_ids"],
            VisualGrids(batch.get("image_grid_thw"), batch.get("video_grid_thw"), batch.get("second_per_grid_ts")),
            attention_mask=batch.get("attention_mask"),
            cu_seqlens=batch.get("cu_seqlens"),
        )
        batch["answer_kinds"] = [kind for example in examples for kind in example.kinds]
        return batch

    def _padded(self, examples: Sequence[Example]) -> Batch:
        lengths = torch.tensor([len(example) for example in examples])
        shape = (len(examples), int(lengths.max()))
        input_ids = np.full(shape, self._pad, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        for row, example in enumerate(examples):
            input_ids[row, : len(example)] = example.input_ids
            labels[row, : len(example)] = example.labels
        return {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "attention_mask": torch.arange(shape[1]) < lengths[:, None],
        }

    def _packed(self, examples: Sequence[Example]) -> Batch:
        bounds = np.cumsum([0, *(len(example) for example in examples)])
        labels = np.concatenate([example.labels for example in examples])
        labels[bounds[:-1]] = IGNORED
        return {
            "input_ids": torch.from_numpy(np.concatenate([example.input_ids for example in examples]))[None],
            "labels": torch.from_numpy(labels)[None],
            "cu_seqlens": torch.from_numpy(bounds),
        }
