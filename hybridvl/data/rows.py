"""Rows of data sets as conversations: columns found, images and videos put where the messages show them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridvl.data.task import Sample
from hybridvl.layers.errors import ConfigError

MARKS = {"<image>": "image", "<video>": "video"}
"""Where an image or video stands in a message that is plain text, as LLaVA's data sets write it."""

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


@dataclass(frozen=True)
class MessageColumns:
    """Which columns of a data set hold what.

    Attributes:
        messages: a list of {"role", "content"}, of {"from", "value"} as ShareGPT has it, or of {"user", "assistant"} as
            The Cauldron has it. Content is text, in which "<image>" marks an image and "<video>" a video, or a list of
            parts as in the chat format.
        images: one image or a list of them, in the order in which the messages show them; an image column called
            "image" is found where this one is missing. Images that no message shows come first in the first question.
        videos: the same for videos, each a file or a list of images; also found as "video". They come after images.
        kinds: the kind of every answer, as text or a list of one for each answer, to slice accuracies by.
    """

    messages: str = "messages"
    images: str = "images"
    videos: str = "videos"
    kinds: str = "kinds"

    def prepare(self, rows: Any, place: str) -> Any:
        """The data set with its images and videos left encoded: workers open them, and errors name the file."""
        features = rows.features
        if not features:  # not known before a stream is read
            return rows
        if self.messages not in features:
            raise ConfigError(f"{place} has no column {self.messages!r}; it has {', '.join(features)}")
        for column in (self.images, "image", self.videos, "video"):
            if column in features:
                rows = rows.cast_column(column, _undecoded(features[column]))
        return rows

    def sample(self, row: Mapping[str, Any], folder: Path, place: str) -> Sample:
        """The conversation of one row; relative image files are looked for in `folder`.

        Raises:
            ConfigError: the messages or images are not what is expected.
        """
        turns = row.get(self.messages)
        if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
            raise ConfigError(f"{place}: column {self.messages!r} is {turns!r:.60}; expected a list of messages")
        given = {
            "image": [_file(image, folder) for image in _listed(row.get(self.images, row.get("image")))],
            "video": [_file(video, folder) for video in _listed(row.get(self.videos, row.get("video")))],
        }
        messages = [_message(turn, given) for pair in turns for turn in _turns(pair)]
        sample: Sample = {"messages": _fill(messages, given, folder, place)}
        kinds = row.get(self.kinds)
        if kinds is not None:
            answers = sum(message["role"] == "assistant" for message in messages)
            sample["kinds"] = [kinds] * answers if isinstance(kinds, str) else list(kinds)
        return sample


def _undecoded(feature: Any) -> Any:
    from datasets import Image, List, Video

    if isinstance(feature, Image | Video):
        return type(feature)(decode=False)
    return List(_undecoded(feature.feature)) if isinstance(feature, List) else feature


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _turns(turn: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A question with its answer as two turns; any other turn as it is."""
    if turn.get("role", turn.get("from")) is not None or not {"user", "assistant"} <= turn.keys():
        return [turn]
    return [{"role": role, "content": turn[role]} for role in ("user", "assistant")]


def _message(turn: Mapping[str, Any], given: Mapping[str, list[Any]]) -> dict[str, Any]:
    """A turn with its content as a list of parts; a mark in text counts where the row has something of its kind."""
    if turn.get("role") is None and turn.get("from") is not None:
        turn = {"role": _SHAREGPT_ROLES.get(turn["from"], turn["from"]), "content": turn.get("value")}
    content = turn.get("content")
    if isinstance(content, list):
        # Arrow gives every part every field, None where it was not written.
        parts = [
            {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else part
            for part in content
        ]
    elif isinstance(content, str) and turn.get("role") == "user" and any(given.values()):
        marks = [mark for mark, kind in MARKS.items() if given[kind]]
        parts = []
        # Text and marks in turn; the line break after a mark belongs to the mark.
        for text in re.split(f"({'|'.join(marks)})\n?", content):
            if text:
                parts.append({"type": MARKS[text]} if text in marks else {"type": "text", "text": text})
    else:
        return {"role": turn.get("role"), "content": content}
    return {"role": turn.get("role"), "content": parts}


def _fill(
    messages: list[dict[str, Any]], given: Mapping[str, list[Any]], folder: Path, place: str
) -> list[dict[str, Any]]:
    """The messages with every image and video part holding what it shows."""
    parts = [
        part
        for message in messages
        if isinstance(message["content"], list)
        for part in message["content"]
        if isinstance(part, dict)
    ]
    first = next((message for message in messages if message["role"] == "user"), None)
    added: list[dict[str, Any]] = []
    for kind, files in given.items():
        shown, left = [part for part in parts if part.get("type") == kind], list(files)
        for number, part in enumerate(shown):
            # Some data sets number the parts; an order other than the list's would show the wrong image.
            if part.pop("index", number) != number:
                raise ConfigError(f"{place}: the messages show the {kind}s out of order; expected index {number} here")
            if kind in part:
                part[kind] = _file(part[kind], folder)
            elif left:
                part[kind] = left.pop(0)
        if left and not shown and first is not None and isinstance(first["content"], list):
            added += [{"type": kind, kind: file} for file in left]
            left = []
        if left or any(kind not in part for part in shown):
            raise ConfigError(f"{place}: the messages show {len(shown)} {kind}s, but the row has {len(files)}")
    if added and first is not None:
        first["content"][:0] = added
    return messages


def _file(value: Any, folder: Path) -> Any:
    """What `open_image` or a video processor takes, from what a data set's row holds."""
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            return value["bytes"]
        value = value.get("path")
    if isinstance(value, list):
        return [_file(frame, folder) for frame in value]
    if isinstance(value, str) and not Path(value).is_absolute():
        return str(folder / value)
    return value
