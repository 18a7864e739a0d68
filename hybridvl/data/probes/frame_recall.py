"""Frame recall: a stream of scanned digits as frames, some of them labelled; later one is asked for by its label."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hybridvl.data.digits import scan_splits, scans
from hybridvl.data.probes.frames import MOST_DISTORTED, frame_parts
from hybridvl.data.probes.probe import Asked, Probe
from hybridvl.data.probes.sizes import bucket, load_prefix, require_lag, require_number, require_skew, skewed_size
from hybridvl.data.probes.symbols import LETTERS, LONGEST_STREAM, letters_text, require_labels
from hybridvl.data.task import Split, require_span


class Stream(NamedTuple):
    """What a stream shows and what is asked about it.

    scans: (frames,) which scan each frame shows. labels: the label of each frame, "" for one without. asked: the frames
    that are asked for, in the order of the questions.
    """

    scans: NDArray[np.int64]
    labels: list[str]
    asked: list[int]


class FrameRecall(Probe[Stream]):
    """Streams of scanned digits as frames, with questions about labelled ones: "Which digit was frame K?".

    A labelled frame has its label, capital letters, in the text before it. Labels differ within a stream and mean
    nothing from one stream to the next, so the answer can only be remembered. The lag of a question is how many frames
    ago the frame came: 1 for the last one. Kinds are "lag_1", "lag_2", "lag_3_4", "lag_5_8" and so on; with a range of
    items they begin with "items_5_8_".

    A stream is determined by (seed, split, epoch, number): training streams never repeat, validation and test streams
    are always the same. No scan is in two splits. Guessing is right one time in ten.

    Args:
        frames: fewest and most frames of a stream, or how many each has.
        items: fewest and most labelled frames, or how many; a stream with fewer frames labels them all, and so does
            null. The other frames are there to be forgotten.
        lag: smallest and largest lag of what is asked for; null: any.
        skew: how much more often training shows short streams, from which recall is learnt first: n frames have a
            weight of n ** -skew; at 0 every n is as likely.
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
        skew: float = 0.0,
        letters: int = 1,
        size: int = 8,
        turns: int = 4,
        eval_turns: int = 1,
        augment: float = 0.5,
        train_streams: int = 16_000,
        val_streams: int = 256,
        test_streams: int = 1_000,
    ) -> None:
        sizes = {"letters": letters, "size": size, "turns": turns, "eval_turns": eval_turns}
        super().__init__((train_streams, val_streams, test_streams), "streams", sizes)
        self.frames = require_span("data.task.frames", frames, LONGEST_STREAM)
        self.items = None if items is None else require_span("data.task.items", items, LONGEST_STREAM)
        self.lag = require_lag(lag, self.frames[0], LONGEST_STREAM)
        require_skew(skew)
        require_number("augment", augment, MOST_DISTORTED)
        most = self.frames[1] if self.items is None else min(self.items[1], self.frames[1])
        require_labels(letters, most, "labelled frames")
        self.skew = skew
        self.letters = letters
        self.size = size
        self.turns = turns
        self.eval_turns = eval_turns
        self.augment = augment

    def draw(self, rng: np.random.Generator, split: Split) -> Stream:
        """The frames of a stream, their labels, and which of them are asked for."""
        count = skewed_size(rng, self.frames, self.skew if split == "train" else 0.0)
        labelled = count if self.items is None else min(count, int(rng.integers(self.items[0], self.items[1] + 1)))
        nearest, farthest = (1, count) if self.lag is None else (self.lag[0], min(self.lag[1], count))
        turns = min(self.turns if split == "train" else self.eval_turns, labelled, farthest - nearest + 1)
        # What is asked for is drawn first, so that every lag that may be asked for is as likely as any other.
        asked = count - rng.choice(np.arange(nearest, farthest + 1), turns, replace=False)
        others = np.setdiff1d(np.arange(count), asked)
        places = np.concatenate([asked, rng.choice(others, labelled - turns, replace=False)])
        labels = [""] * count
        names = rng.choice(len(LETTERS) ** self.letters, labelled, replace=False)
        for place, name in zip(places.tolist(), names.tolist(), strict=True):
            labels[place] = letters_text(name, self.letters)
        return Stream(rng.choice(scan_splits()[split], size=count), labels, asked.tolist())

    def show(self, drawn: Stream, rng: np.random.Generator, split: Split) -> list[dict[str, Any]]:
        """The frames, each with its label before it."""
        augment = self.augment if split == "train" else 0.0
        return frame_parts(drawn.scans, drawn.labels, self.size, augment, rng)

    def ask(self, drawn: Stream) -> list[Asked]:
        """Which digit some labelled frames were."""
        return [
            Asked(
                f"Which digit was frame {drawn.labels[place]}?",
                str(scans()[1][drawn.scans[place]]),
                load_prefix("items", sum(map(bool, drawn.labels)), self.items or self.frames)
                + f"lag_{bucket(len(drawn.labels) - place)}",
                0.1,
            )
            for place in drawn.asked
        ]
