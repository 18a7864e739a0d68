"""What tests of probes share: conversations read back from their token ids, and what holds for every probe."""

from __future__ import annotations

import re
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from hybridvl.data import ImageConfig, load_tokenizer
from hybridvl.data.chat import IGNORED, ChatFormat
from hybridvl.data.digits import scan_splits, scans
from hybridvl.data.encode import SampleEncoder
from hybridvl.data.images import ImageProcessor
from hybridvl.data.probes.probe import Probe

SPLITS = ("train", "val", "test")
IMAGES = ImageConfig(patch_size=8, temporal_patch_size=1, merge_size=1, min_pixels=64, mean=(0.8,), std=(0.3,))
_TURN = re.compile(r"<\|im_start\|>user\n(.*?)<\|im_end\|>\n<\|im_start\|>assistant\n(.*?)<\|im_end\|>\n", re.S)


class Turn(NamedTuple):
    """A question as the model reads it, the answer that it learns, and the answer's kind."""

    question: str
    answer: str
    kind: str


@cache
def encoder() -> SampleEncoder:
    """The built-in tokenizer, 8-pixel patches of one token each."""
    return SampleEncoder(ChatFormat(load_tokenizer(), None), ImageProcessor(IMAGES), max_tokens=1_000_000)


def read_turns(task: Probe[Any], split: Any, index: int, epoch: int = 0, seed: int = 0) -> list[Turn]:
    """The turns of a sample by its token ids alone; the labels are the answers and what closes them, no more."""
    example = encoder()(task.source(split, seed).sample(index, epoch))
    text = _decoded(example.input_ids)
    pairs = _TURN.findall(text)
    assert "".join(_TURN.sub("", text)) == ""
    assert _decoded(example.labels[example.labels != IGNORED]) == "".join(f"{answer}<|im_end|>" for _, answer in pairs)
    return [Turn(*pair, kind) for pair, kind in zip(pairs, example.kinds, strict=True)]


def read_images(task: Probe[Any], split: Any, index: int, epoch: int = 0, seed: int = 0) -> list[np.ndarray]:
    """The grey pictures of a sample, put together again from the patches that the model reads."""
    example = encoder()(task.source(split, seed).sample(index, epoch))
    pictures = []
    rows = np.rint((example.pixel_values * IMAGES.std[0] + IMAGES.mean[0]) * 255)
    for _, lines, columns in example.image_grid_thw.tolist():
        own, rows = rows[: lines * columns], rows[lines * columns :]
        pictures.append(own.reshape(lines, columns, 8, 8).transpose(0, 2, 1, 3).reshape(lines * 8, columns * 8))
    assert len(rows) == 0
    return pictures


def digit_of(picture: np.ndarray, split: Any) -> int:
    """The digit of an undistorted 8 x 8 picture: of the one scan of the split that was drawn like this."""
    ink = (236.0 - picture) / 212.0
    differences = np.abs(_drawings(split) - ink).max((1, 2))
    # No more than grey levels are rounded.
    assert differences.min() < 0.6 / 212
    return int(scans()[1][scan_splits()[split]][differences.argmin()])


def tokens_in(text: str) -> list[int]:
    """The tokens of a text by itself."""
    return encoder().chat._encode_text(text)


def bounds(kind: str, name: str) -> tuple[int, int]:
    """The least and the most that the bucket of `name` in a kind holds."""
    found = re.search(rf"(?:^|_){name}_(\d+)(?:_(\d+))?(?:_[a-z]|$)", kind)
    assert found, (kind, name)
    low, high = int(found[1]), int(found[2] or found[1])
    # Buckets end at powers of two and begin after the one before.
    assert high & (high - 1) == 0
    assert low == high // 2 + 1
    return low, high


def assert_follows_from_its_number(task: Probe[Any]) -> None:
    """Fail unless samples follow from seed, split, epoch and number, those of evaluation not from the epoch."""

    def shown(split: Any, seed: int, index: int, epoch: int) -> bytes:
        example = encoder()(task.source(split, seed).sample(index, epoch))
        return example.input_ids.tobytes() + example.pixel_values.tobytes()

    keys = ((0, 5, 1), (0, 5, 2), (0, 6, 1), (1, 5, 1))
    assert shown("train", *keys[0]) == shown("train", *keys[0])
    assert len({shown("train", *key) for key in keys}) == 4
    assert shown("val", 0, 5, 0) == shown("val", 0, 5, 7)
    assert len({shown(split, 0, 5, 0) for split in SPLITS}) == 3


def assert_uniform(values: list[int], low: int, high: int) -> None:
    """Fail unless all numbers from low to high come about as often: five standard deviations of a count."""
    counts = np.bincount(values, minlength=high + 1)
    assert counts[:low].sum() == 0
    assert len(counts) == high + 1
    expected = len(values) / (high + 1 - low)
    assert np.abs(counts[low:] - expected).max() < 5 * np.sqrt(expected)


@cache
def _drawings(split: Any) -> np.ndarray:
    """(N, 8, 8) scans of a split, bilinearly sampled at 1.15 times their distances from the middle, paper outside."""
    at = (np.arange(8) - 3.5) * 1.15 + 3.5 + 1  # in pixels of the padded scan
    low = np.floor(at).astype(int)
    weights = np.zeros((8, 12))
    weights[np.arange(8), low + 1] = 1 - (at - low)
    weights[np.arange(8), low + 2] = at - low
    padded = np.pad(scans()[0][scan_splits()[split]], ((0, 0), (2, 2), (2, 2)))
    return np.einsum("ya,nab,xb->nyx", weights, padded, weights)


def _decoded(ids: Any) -> str:
    return encoder().chat.tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)
