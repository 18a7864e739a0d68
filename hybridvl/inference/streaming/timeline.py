"""Where the tokens of a stream stand: what goes before and after every frame, and the position of each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hybridvl.data.chat import ChatFormat, is_text
from hybridvl.inference.streaming.steps import require_time
from hybridvl.layers.errors import ConfigError

LAYOUTS = ("video", "images")
"""How frames stand in a stream: all between two texts as one growing video, or each as an image of its own."""

_SAME = 1e-6  # seconds by which a time may be short of a whole number of positions


@dataclass(frozen=True)
class Feed:
    """Tokens that a model takes at once: a text, the features of one step of frames, and a text.

    before, after: token ids. features: number of visual tokens between them. positions: (3, T) int64, on the host.
    """

    before: list[int]
    features: int
    after: list[int]
    positions: Tensor

    @property
    def length(self) -> int:
        """T, the number of tokens."""
        return self.positions.shape[1]


@dataclass
class Video:
    """A video that is still growing.

    origin: position at which it begins. began: time of its first frame. step: temporal position of the last one,
    counted from the origin.
    """

    origin: int
    began: float
    step: int = -1


@dataclass
class Timeline:
    """The bookkeeping of one stream, all of it on the host: nothing here waits for a device.

    A stream is a conversation whose user is still showing frames. Frames stand at their times: the temporal position of
    a frame is that of the video's beginning plus seconds * rate, cut to a whole number, and at least one more than that
    of the frame before, so that no two frames share one. Text goes on one past the largest position so far.

    Attributes:
        chat: the chat format.
        layout: one of LAYOUTS.
        rate: temporal positions in a second, the model's tokens_per_second.
        ids: tokens that wait for the next frame or question, as `text` does after them.
        text: see ids; neighbouring texts are tokenized as one.
        position: the next position.
        frames: steps of frames so far.
        tokens: tokens handed out so far.
        time: of the last frame, in seconds; None before the first one.
        video: the video that is growing, if one is.
    """

    chat: ChatFormat
    layout: str = "video"
    rate: float = 2.0
    ids: list[int] = field(default_factory=list)
    text: str = ""
    position: int = 0
    frames: int = 0
    tokens: int = 0
    time: float | None = None
    video: Video | None = None

    @classmethod
    def opened(cls, chat: ChatFormat, layout: str, rate: float) -> Timeline:
        """The beginning of a stream: the system turn and the opened user's turn wait for the first frame."""
        if layout not in LAYOUTS:
            raise ConfigError(f"layout: {layout!r:.80}; expected one of {', '.join(LAYOUTS)}")
        ids, text = chat.turn_opening()
        return cls(chat, layout, rate, ids, text)

    def copy(self) -> Timeline:
        """One that goes on by itself."""
        video = None if self.video is None else dataclasses.replace(self.video)
        return dataclasses.replace(self, ids=list(self.ids), video=video)

    def frame(self, rows: int, columns: int, time: float) -> Feed:
        """A step of frames of rows x columns visual tokens, shown at `time` seconds.

        Raises:
            ConfigError: a time before that of the last frame.
        """
        require_time(time, self.time)
        start, end = self.chat.visual_ids()
        before = self._waiting()
        if self.video is None:
            before.append(start)
        pieces = [self._text_positions(len(before))]
        if self.video is None:
            self.video = Video(self.position, time)
        video = self.video
        video.step = max(video.step + 1, math.floor((time - video.began + _SAME) * self.rate))
        step = torch.full((rows, columns), video.step, device="cpu")
        down, across = torch.meshgrid(
            torch.arange(rows, device="cpu"), torch.arange(columns, device="cpu"), indexing="ij"
        )
        pieces.append(torch.stack([step, down, across]).flatten(1) + video.origin)
        self.position = max(self.position, video.origin + max(video.step, rows - 1, columns - 1) + 1)
        after = []
        if self.layout == "images":
            after, self.video = [end], None
            pieces.append(self._text_positions(1))
        self.time = time
        self.frames += 1
        return self._feed(before, rows * columns, after, pieces)

    def say(self, text: str) -> None:
        """Append a text, which goes into the model together with what follows it; an empty one is none.

        Raises:
            ConfigError: it is no text that can be encoded.
        """
        if not is_text(text):
            raise ConfigError(f"text: {text!r:.80}; expected a text")
        if text:
            self._end_video()
            self.text += text

    def question(self, text: str) -> Feed:
        """A question at this moment, up to where its answer begins; for a copy, as a stream does not go on after it."""
        self.say(text)
        self._end_video()
        ids = [*self._waiting(), *self.chat.turn_closing()]
        return self._feed(ids, 0, [], [self._text_positions(len(ids))])

    def record(self) -> dict[str, Any]:
        """Everything but the chat format, in words of JSON; `restored` takes it back."""
        kept = [item.name for item in dataclasses.fields(self) if item.name not in ("chat", "video")]
        video = None if self.video is None else dataclasses.asdict(self.video)
        return {**{name: getattr(self, name) for name in kept}, "video": video}

    @classmethod
    def restored(cls, chat: ChatFormat, record: Mapping[str, Any], rate: float) -> Timeline:
        """The timeline that `record` told of, of a model with `rate` temporal positions in a second.

        Raises:
            ConfigError: it is not what `record` gives.
        """
        video = record["video"]
        made = cls(chat, **{**record, "video": None if video is None else Video(**video)})
        known = len(chat.tokenizer)
        counts = [made.position, made.frames, made.tokens, *made.ids]
        if made.video is not None:
            counts += [made.video.origin, made.video.step + 1]
        if not all(type(count) is int and 0 <= count < 2**53 for count in counts) or max(made.ids, default=0) >= known:
            raise ConfigError(f"{counts!r:.80}; expected whole numbers of at least 0, and tokens below {known}")
        if made.layout not in LAYOUTS or made.rate != rate or not is_text(made.text):
            raise ConfigError(
                f"{made.layout!r:.20}, {made.rate!r:.20}, {made.text!r:.20}; expected layout, {rate}, text"
            )
        for time in (made.time, None if made.video is None else made.video.began):
            if time is not None:
                require_time(time, None)
        return made

    def _end_video(self) -> None:
        if self.video is not None:
            self.ids.append(self.chat.visual_ids()[1])
            self.video = None

    def _waiting(self) -> list[int]:
        ids = [*self.ids, *self.chat.text_ids(self.text)]
        self.ids, self.text = [], ""
        return ids

    def _text_positions(self, count: int) -> Tensor:
        made = torch.arange(self.position, self.position + count, device="cpu").expand(3, -1)
        self.position += count
        return made

    def _feed(self, before: list[int], features: int, after: list[int], pieces: list[Tensor]) -> Feed:
        positions = torch.cat(pieces, dim=1)
        self.tokens += positions.shape[1]
        return Feed(before, features, after, positions)
