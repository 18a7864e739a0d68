"""Rows of data sets as conversations: columns found, images put where the messages show them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridvl.data.task import Sample
from hybridvl.layers.errors import ConfigError

IMAGE_MARK = "<image>"
"""Where an image stands in a message that is plain text, as LLaVA's data sets write it."""

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


@dataclass(frozen=True)
class MessageColumns:
    """Which columns of a data set hold what.

    Attributes:
        messages: a list of {"role", "content"}, or of {"from", "value"} as ShareGPT has it. Content is text, in which
            "<image>" marks an image, or a list of parts as in the chat format.
        images: one image or a list of them, in the order in which the messages show them; an image column called
            "image" is found where this one is missing. Images that no message shows come first in the first question.
        kinds: the kind of every answer, as text or a list of one for each answer, to slice accuracies by.
    """

    messages: str = "messages"
    images: str = "images"
    kinds: str = "kinds"

    def prepare(self, rows: Any, place: str) -> Any:
        """The data set with its images left encoded, so that workers open them and errors name the file."""
        features = rows.features
        if not features:  # not known before a stream is read
            return rows
        if self.messages not in features:
            raise ConfigError(f"{place} has no column {self.messages!r}; it has {', '.join(features)}")
        for column in (self.images, "image"):
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
        given = row.get(self.images, row.get("image"))
        given = given if isinstance(given, list) else [] if given is None else [given]
        images = [_image(image, folder) for image in given]
        messages = [_message(turn, bool(images)) for turn in turns]
        sample: Sample = {"messages": _fill(messages, images, folder, place)}
        kinds = row.get(self.kinds)
        if kinds is not None:
            answers = sum(message["role"] == "assistant" for message in messages)
            sample["kinds"] = [kinds] * answers if isinstance(kinds, str) else list(kinds)
        return sample


def _undecoded(feature: Any) -> Any:
    from datasets import Image, List

    if isinstance(feature, Image):
        return Image(decode=False)
    if isinstance(feature, List) and isinstance(feature.feature, Image):
        return List(Image(decode=False))
    return feature


def _message(turn: Mapping[str, Any], marks: bool) -> dict[str, Any]:
    """A turn with its content as a list of parts; "<image>" in text is an image when the row has images (`marks`)."""
    if turn.get("role") is None and turn.get("from") is not None:
        turn = {"role": _SHAREGPT_ROLES.get(turn["from"], turn["from"]), "content": turn.get("value")}
    content = turn.get("content")
    if isinstance(content, list):
        # Arrow gives every part every field, None where it was not written.
        parts = [
            {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else part
            for part in content
        ]
    elif isinstance(content, str) and marks and turn.get("role") == "user":
        parts = []
        for number, text in enumerate(content.split(IMAGE_MARK)):
            parts += [{"type": "image"}] * (number > 0)
            # The line break after a mark belongs to the mark.
            text = text.removeprefix("\n") if number else text
            parts += [{"type": "text", "text": text}] if text else []
    else:
        return {"role": turn.get("role"), "content": content}
    return {"role": turn.get("role"), "content": parts}


def _fill(messages: list[dict[str, Any]], images: list[Any], folder: Path, place: str) -> list[dict[str, Any]]:
    """The messages with every image part holding its image."""
    left = list(images)
    shown = [
        part
        for message in messages
        if isinstance(message["content"], list)
        for part in message["content"]
        if isinstance(part, dict) and part.get("type") == "image"
    ]
    for part in shown:
        if "image" in part:
            part["image"] = _image(part["image"], folder)
        elif left:
            part["image"] = left.pop(0)
    first = next((message for message in messages if message["role"] == "user"), None)
    if left and not shown and first is not None and isinstance(first["content"], list):
        first["content"][:0] = [{"type": "image", "image": image} for image in left]
        left = []
    missing = sum("image" not in part for part in shown)
    if left or missing:
        raise ConfigError(f"{place}: the messages show {len(shown)} images, but the row has {len(images)}")
    return messages


def _image(image: Any, folder: Path) -> Any:
    """What `open_image` takes, from what a data set's row holds."""
    if isinstance(image, Mapping):
        if image.get("bytes") is not None:
            return image["bytes"]
        image = image.get("path")
    if isinstance(image, str) and not Path(image).is_absolute():
        return str(folder / image)
    return image
