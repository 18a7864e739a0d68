"""Frame recall: streams that show what their answers say, lags and items as asked for, kinds, errors."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from probe_cases import digit_of

from hybridvl.data import ChatDataModule, ImageConfig
from hybridvl.data.digits import scan_splits, scans
from hybridvl.data.probes.frame_recall import FrameRecall, Stream
from hybridvl.data.probes.probe import ProbeSource
from hybridvl.layers.errors import ConfigError


def parts_of(sample: Any) -> list[tuple[str, np.ndarray]]:
    """(label, picture) of every frame."""
    frames, label = [], ""
    for part in sample["messages"][0]["content"][:-1]:
        if part["type"] == "text":
            label = part["text"]
        else:
            frames.append((label, part["image"]))
            label = ""
    return frames


def turns_of(sample: Any) -> list[tuple[str, str]]:
    """(label asked for, answer) of every question."""
    messages = sample["messages"]
    texts = [message["content"][-1]["text"] for message in messages[::2]]
    assert all(text.startswith("Which digit was frame ") and text.endswith("?") for text in texts)
    return [(text[22:-1], answer["content"]) for text, answer in zip(texts, messages[1::2], strict=True)]


@given(
    index=st.integers(0, 10**6),
    split=st.sampled_from(["train", "val", "test"]),
    frames=st.tuples(st.integers(1, 12), st.integers(0, 20)),
    items=st.one_of(st.none(), st.tuples(st.integers(1, 6), st.integers(0, 10))),
    letters=st.integers(1, 2),
)
@settings(deadline=None, max_examples=40)
def test_answers_are_the_digits_of_the_frames_asked_for(
    index: int, split: Any, frames: tuple[int, int], items: tuple[int, int] | None, letters: int
) -> None:
    most = min(26**letters, sum(frames))
    span = (min(frames[0], most), min(sum(frames), 26**letters))
    labelled = None if items is None else (items[0], sum(items))
    task = FrameRecall(span, labelled, letters=letters, turns=3, eval_turns=2, augment=0.0)
    sample = task.source(split, seed=4).sample(index, epoch=1)
    shown, turns = parts_of(sample), turns_of(sample)
    assert span[0] <= len(shown) <= span[1]
    assert all(picture.shape == (8, 8) for _, picture in shown)
    labels = [label for label, _ in shown if label]
    assert len(set(labels)) == len(labels)
    assert all(len(label) == letters and label.isupper() for label in labels)
    low, high = (len(shown), len(shown)) if labelled is None else labelled
    assert min(low, len(shown)) <= len(labels) <= min(high, len(shown))
    assert len(turns) == len({label for label, _ in turns}) == min(3 if split == "train" else 2, len(labels))
    by_label = dict(shown)
    for (label, answer), kind in zip(turns, sample["kinds"], strict=True):
        assert answer == str(digit_of(by_label[label], split))
        lag = len(shown) - [label for label, _ in shown].index(label)
        numbers = [int(number) for number in kind.split("lag_")[1].split("_")]
        assert numbers[0] <= lag <= numbers[-1]
        assert math.log2(numbers[-1]).is_integer()


def test_streams_use_the_scans_of_their_split_alone() -> None:
    for split, numbers in scan_splits().items():
        source = FrameRecall(frames=20).source(split, seed=3)
        used = {int(number) for stream in range(60) for number in source.drawn(stream, epoch=2).scans}
        assert used <= set(numbers.tolist())
        assert len(used) > 150


def test_streams_follow_from_seed_split_epoch_and_number() -> None:
    def stream(split: Any, seed: int, index: int, epoch: int) -> bytes:
        source = FrameRecall().source(split, seed)
        made = source.drawn(index, epoch)
        shown = [label for label, _ in parts_of(source.sample(index, epoch))]
        assert shown == made.labels
        return made.scans.tobytes()

    assert stream("train", 0, 5, 1) == stream("train", 0, 5, 1)
    assert len({stream("train", *key) for key in ((0, 5, 1), (0, 5, 2), (0, 6, 1), (1, 5, 1))}) == 4
    assert stream("val", 0, 5, 0) == stream("val", 0, 5, 7)


def _lags(source: ProbeSource[Stream], count: int = 600) -> list[int]:
    streams = (source.drawn(index) for index in range(count))
    return [len(stream.labels) - asked for stream in streams for asked in stream.asked]


@pytest.mark.parametrize(("lag", "first", "last"), [(None, 1, 16), ((5, 8), 5, 8), ((10, 40), 10, 16)])
def test_every_lag_is_asked_for_as_often(lag: tuple[int, int] | None, first: int, last: int) -> None:
    counts = Counter(_lags(FrameRecall(frames=16, items=4, lag=lag).source("test", 0), 1600))
    assert set(counts) == set(range(first, last + 1))
    expected = 1600 / len(counts)
    # Five standard deviations of a count.
    assert max(abs(count - expected) for count in counts.values()) < 5 * math.sqrt(expected)


@pytest.mark.parametrize(("split", "weight"), [("train", 1.5), ("test", 0.0)])
def test_training_shows_short_streams_more_often(split: Any, weight: float) -> None:
    source = FrameRecall((1, 6), skew=1.5).source(split, 0)
    counts = np.bincount([len(source.drawn(index).scans) for index in range(3000)], minlength=7)[1:]
    weights = 1 / np.arange(1, 7) ** weight
    expected = 3000 * weights / weights.sum()
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()


def test_kinds_are_buckets_of_lags_and_of_items() -> None:
    kinds = set(FrameRecall(frames=9, items=3).source("val", 0).sample(0, 0)["kinds"])
    source = FrameRecall(frames=9, items=3).source("val", 0)
    kinds = {kind for index in range(200) for kind in source.sample(index, 0)["kinds"]}
    assert kinds == {"lag_1", "lag_2", "lag_3_4", "lag_5_8", "lag_9_16"}
    source = FrameRecall(frames=6, items=(2, 5), lag=(6, 6)).source("val", 0)
    kinds = {kind for index in range(200) for kind in source.sample(index, 0)["kinds"]}
    assert kinds == {"items_2_lag_5_8", "items_3_4_lag_5_8", "items_5_8_lag_5_8"}


def test_labels_do_not_give_the_answer_away() -> None:
    """Neither a label nor its frame's place has much to do with the digit: guesses from them are right by chance."""
    source = FrameRecall(frames=12).source("train", 0)
    rows = []
    for index in range(2000):
        stream = source.drawn(index)
        asked = stream.asked[0]
        rows.append((stream.labels[asked], asked, int(scans()[1][stream.scans[asked]])))
    for key in (0, 1):
        seen: dict[Any, Counter[int]] = {}
        for row in rows[:1000]:
            seen.setdefault(row[key], Counter())[row[2]] += 1
        right = sum(seen[row[key]].most_common(1)[0][0] == row[2] for row in rows[1000:] if row[key] in seen)
        assert right / 1000 < 0.1 + 5 * math.sqrt(0.09 / 1000)


def test_only_training_frames_are_distorted() -> None:
    def clean_paper(split: Any, augment: float) -> float:
        source = FrameRecall(augment=augment).source(split, 0)
        return float(np.mean([(picture == 236).mean() for _, picture in parts_of(source.sample(0, 0))]))

    assert clean_paper("train", 1.0) < 0.1
    assert min(clean_paper("train", 0.0), clean_paper("val", 1.0), clean_paper("test", 1.0)) > 0.3


def test_a_small_frame_is_one_token() -> None:
    images = ImageConfig(8, 1, 1, min_pixels=64, mean=(0.8,), std=(0.3,))
    data = ChatDataModule(FrameRecall(frames=30, items=3), images=images, batch_size=2, system=None)
    batch = next(iter(data.val_dataloader()))
    assert batch["image_grid_thw"].tolist() == [[1, 1, 1]] * 60
    assert int((batch["input_ids"] == data.chat.image_token_id).sum()) == 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 0}, r"data\.task\.frames: 0; expected two numbers, 1 <= fewest <= most"),
        ({"frames": (5, 3)}, r"data\.task\.frames: \[5, 3\]"),
        ({"items": (0, 3)}, r"data\.task\.items: \[0, 3\]"),
        ({"lag": (0, 3)}, r"data\.task\.lag: \[0, 3\]"),
        ({"lag": (13, 20)}, r"data\.task\.lag: \[13, 20\]; expected a smallest lag of at most the fewest frames, 12"),
        ({"frames": 27}, r"data\.task\.letters: 1, which give 26 labels; expected enough for 27 labelled frames"),
        ({"skew": 11.0}, r"data\.task\.skew: 11\.0; expected a number from 0 to 10"),
        ({"letters": 0}, r"data\.task\.letters: 0; expected at least 1"),
        ({"size": 0}, r"data\.task\.size: 0"),
        ({"turns": 0}, r"data\.task\.turns: 0"),
        ({"test_streams": 0}, r"data\.task\.test_streams: 0"),
        ({"augment": 3.0}, r"data\.task\.augment: 3\.0"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FrameRecall(**options)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected one of train, val, test"):
        FrameRecall().source("dev", 0)  # type: ignore[arg-type]
