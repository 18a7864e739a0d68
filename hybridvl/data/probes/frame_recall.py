"""Frame recall: a stream of scanned digits as frames, some of them labelled; later one is asked for by its label."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hybridvl.data.digits import scan_splits, scans
from hybridvl.data.scans import render_page
from hybridvl.data.task import Sample, Source, Split, Task, require_span, require_split, sample_rng
from hybridvl.layers.errors import ConfigError

_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MOST_FRAMES = 100_000


class Stream(NamedTuple):
    """What a stream shows and what is asked about it.

    scans: (frames,) which scan each frame shows. labels: the label of each frame, "" for one without. asked: the frames
    that are asked for, in the order of the questions.
    """

    scans: NDArray[np.int64]
    labels: list[str]
    asked: list[int]


class FrameRecall(Task):
    """Streams of scanned digits as frames, with questions about labelled ones: "Which digit was frame K?".

    A labelled frame has its label, capital letters, in the text before it. Labels differ within a stream and mean
    nothing from one stream to the next, so the answer can only be remembered. The lag of a question is how many frames
    ago the frame came: 1 for the last one. Kinds are "lag_1", "lag_2", "lag_3_4", "lag_5_8" and so on; with a range of
    items they begin with "items_5_8_".

    A stream is determined by (seed, split, epoch, number): training streams never repeat, validation and test streams
    are always the same. No scan is in two splits.

    Args:
        frames: fewest and most frames of a stream, or how many each has.
        items: fewest and most labelled frames, or how many; a stream with fewer frames labels them all, and so does
            null. The other frames are there to be forgotten.
        lag: smallest and largest lag of what is asked for; null: any.
        letters: letters of a label.
        size: pixels per side of a frame.
        turns: questions about one training stream, in one conversation, about different frames.
        eval_turns: the same for validation and test streams.
        augment: strength of the distortion of training digits; 0 turns it off, 1 is as strong as it stays legible.
        train_streams: training streams in an epoch.
        val_streams: validation streams.
        test_streams: test streams.
    """

    def __init__(
        self,
        frames: int | tuple[int, int] = 12,
        items: int | tuple[int, int] | None = None,
        lag: tuple[int, int] | None = None,
        letters: int = 1,
        size: int = 8,
        turns: int = 4,
        eval_turns: int = 1,
        augment: float = 0.5,
        train_streams: int = 16_000,
        val_streams: int = 256,
        test_streams: int = 1_000,
    ) -> None:
        self.frames = require_span("data.task.frames", frames, _MOST_FRAMES)
        self.items = None if items is None else require_span("data.task.items", items, _MOST_FRAMES)
        self.lag = None if lag is None else require_span("data.task.lag", lag, _MOST_FRAMES)
        self.streams = {"train": train_streams, "val": val_streams, "test": test_streams}
        sizes = {"letters": letters, "size": size, "turns": turns, "eval_turns": eval_turns}
        for name, value in {**sizes, **{f"{split}_streams": count for split, count in self.streams.items()}}.items():
            if value < 1:
                raise ConfigError(f"data.task.{name}: {value}; expected at least 1")
        if not 0 <= augment <= 2:
            raise ConfigError(f"data.task.augment: {augment}; expected a number from 0 to 2")
        labels = len(_ALPHABET) ** letters
        most = self.frames[1] if self.items is None else min(self.items[1], self.frames[1])
        if most > labels:
            raise ConfigError(
                f"data.task.letters: {letters}, which give {labels} labels; expected enough for {most} labelled frames"
            )
        if self.lag is not None and self.lag[0] > self.frames[0]:
            raise ConfigError(
                f"data.task.lag: {list(self.lag)}; expected a smallest lag of at most the fewest frames, "
                f"{self.frames[0]}"
            )
        self.letters = letters
        self.size = size
        self.turns = turns
        self.eval_turns = eval_turns
        self.augment = augment

    def source(self, split: Split, seed: int) -> FrameSource:
        """The streams of a split."""
        require_split(split)
        return FrameSource(self, split, seed)


class FrameSource(Source):
    """The streams of one split of a `FrameRecall` task."""

    def __init__(self, task: FrameRecall, split: Split, seed: int) -> None:
        self.task = task
        self.split = split
        self.seed = seed
        self.training = split == "train"

    def __len__(self) -> int:
        return self.task.streams[self.split]

    def sample(self, index: int, epoch: int) -> Sample:
        """Stream `index` with its questions; evaluation streams are the same in every epoch."""
        rng = sample_rng(self.seed, self.split, index, epoch)
        stream = self._stream(rng)
        augment = self.task.augment if self.training else 0.0
        strip = render_page(scans()[0], stream.scans[:, None], self.task.size, augment, rng)
        parts: list[dict[str, Any]] = []
        for frame, label in zip(np.split(strip, len(stream.labels)), stream.labels, strict=True):
            parts += [{"type": "text", "text": label}] if label else []
            parts.append({"type": "image", "image": frame})
        messages: list[dict[str, Any]] = []
        for number, asked in enumerate(stream.asked):
            question = {"type": "text", "text": f"Which digit was frame {stream.labels[asked]}?"}
            messages.append({"role": "user", "content": [*parts, question] if number == 0 else [question]})
            messages.append({"role": "assistant", "content": str(scans()[1][stream.scans[asked]])})
        return {"messages": messages, "kinds": [self._kind(stream, asked) for asked in stream.asked]}

    def stream(self, index: int, epoch: int = 0) -> Stream:
        """What stream `index` shows and asks for."""
        return self._stream(sample_rng(self.seed, self.split, index, epoch))

    def _stream(self, rng: np.random.Generator) -> Stream:
        task = self.task
        count = int(rng.integers(task.frames[0], task.frames[1] + 1))
        labelled = count if task.items is None else min(count, int(rng.integers(task.items[0], task.items[1] + 1)))
        nearest, farthest = (1, count) if task.lag is None else (task.lag[0], min(task.lag[1], count))
        turns = min(task.turns if self.training else task.eval_turns, labelled, farthest - nearest + 1)
        # What is asked for is drawn first, so that every lag that may be asked for is as likely as any other.
        asked = count - rng.choice(np.arange(nearest, farthest + 1), turns, replace=False)
        others = np.setdiff1d(np.arange(count), asked)
        places = np.concatenate([asked, rng.choice(others, labelled - turns, replace=False)])
        labels = [""] * count
        names = rng.choice(len(_ALPHABET) ** task.letters, labelled, replace=False)
        for place, name in zip(places.tolist(), names.tolist(), strict=True):
            labels[place] = _label(name, task.letters)
        return Stream(rng.choice(scan_splits()[self.split], size=count), labels, asked.tolist())

    def _kind(self, stream: Stream, asked: int) -> str:
        low, high = self.task.items or self.task.frames
        items = f"items_{_bucket(sum(map(bool, stream.labels)))}_" if low < high else ""
        return f"{items}lag_{_bucket(len(stream.labels) - asked)}"


def _label(number: int, letters: int) -> str:
    text = ""
    for _ in range(letters):
        number, letter = divmod(number, len(_ALPHABET))
        text = _ALPHABET[letter] + text
    return text


def _bucket(number: int) -> str:
    """The numbers of about the same size, up to a power of two: "1", "2", "3_4", "5_8" and so on."""
    high = 1 << (number - 1).bit_length()
    return str(high) if high <= 2 else f"{high // 2 + 1}_{high}"
