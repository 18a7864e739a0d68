"""The text, image and video side of a model, kept in its folder: tokenizer, system turn, sizes and rates."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridvl.checkpoints.files import parse_json, read_text, text_writer, write_files
from hybridvl.data.chat import ChatFormat
from hybridvl.data.checks import from_settings
from hybridvl.data.images import ImageConfig, ImageProcessor
from hybridvl.data.tokens import load_tokenizer
from hybridvl.data.video import VideoConfig, VideoProcessor
from hybridvl.data.visuals import Visuals, read_visuals, token_counts
from hybridvl.inference.foreign import chat_template, has_settings, read_settings, settings_files, use_template
from hybridvl.layers.errors import ConfigError

FILE = "hybridvl_processor.json"
GENERATION_FILE = "generation_config.json"

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Processor:
    """Turns messages into model inputs and tokens into text.

    chat: the chat format with its tokenizer. images, videos: how pictures and clips become patches; videos None takes
    Qwen2.5-VL's settings.
    """

    chat: ChatFormat
    images: ImageProcessor
    videos: VideoProcessor | None = None

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files and hybridvl_processor.json into a folder.

        The chat template goes with the tokenizer, and preprocessor_config.json and video_preprocessor_config.json
        beside it where images have colours, so that transformers makes the same of messages and pictures.
        generation_config.json, unless the folder has one, says which token ends an answer and which one fills rows, so
        that the generate method of transformers' models stops there.

        Raises:
            ConfigError: the folder cannot be written.
        """
        settings = {
            "system": self.chat.system,
            "images": dataclasses.asdict(self.images.config),
            "videos": dataclasses.asdict(self._videos.config),
        }
        files = {FILE: settings, **settings_files(self.images.config, self._videos.config)}
        if not (Path(folder) / GENERATION_FILE).exists():
            files[GENERATION_FILE] = {"eos_token_id": self.stop_id, "pad_token_id": self.chat.pad_token_id}
        texts = {name: json.dumps(values, indent=2) + "\n" for name, values in files.items()}
        write_files(Path(folder), {name: text_writer(text) for name, text in texts.items()})
        if self.chat.tokenizer.chat_template is None:
            self.chat.tokenizer.chat_template = chat_template(self.chat.system)
        self.chat.tokenizer.save_pretrained(str(folder))

    @classmethod
    def load(cls, folder: str | Path) -> Processor:
        """The processor in a folder: what `save` wrote, or the files of Qwen2.5-VL and InfiniteVL.

        Those are preprocessor_config.json, video_preprocessor_config.json or processor_config.json, a tokenizer, and a
        chat template where there is one.

        Raises:
            ConfigError: the folder has none, or it is damaged or of another kind of model.
        """
        own, path = Path(folder) / FILE, Path(folder)
        if not own.is_file():
            if not has_settings(path):
                raise ConfigError(
                    f"{folder}: neither {FILE} nor preprocessor_config.json; expected a model folder, for example "
                    "RUN/model or a Qwen2.5-VL checkpoint"
                )
            images, videos = read_settings(path)
            tokenizer = load_tokenizer(str(folder))
            return cls._of(ChatFormat(tokenizer, use_template(tokenizer, path)), images, videos)
        settings = parse_json(read_text(own), own)
        missing = [name for name in ("system", "images") if name not in settings]
        if missing:
            raise ConfigError(f"{own}: lacks {missing[0]!r}; expected what Processor.save wrote")
        images = from_settings(ImageConfig, settings["images"], f"{own}: images")
        videos = from_settings(VideoConfig, settings.get("videos", {}), f"{own}: videos")
        tokenizer = load_tokenizer(str(folder))
        try:
            chat = ChatFormat(tokenizer, settings["system"])
        except ConfigError as error:
            raise ConfigError(f"{own}: {error}") from error
        return cls._of(chat, images, videos)

    @property
    def stop_id(self) -> int:
        """The token that ends an answer."""
        return self.chat.tokenizer.get_vocab()["<|im_end|>"]

    def prompt(self, messages: Messages) -> dict[str, Tensor]:
        """What the model takes to go on with a conversation.

        Returns:
            input_ids (1, T) int64; with images pixel_values (P, patch_dim) float32 and image_grid_thw (images, 3)
            int64; with videos pixel_values_videos, video_grid_thw and second_per_grid_ts (videos,) float32.

        Raises:
            ConfigError: malformed messages, or an image or video that cannot be read.
        """
        ids, visuals = self._encode(messages, "messages")
        return {"input_ids": torch.tensor([ids]), **visuals.inputs()}

    def batch(self, conversations: Sequence[Messages]) -> dict[str, Tensor]:
        """The same for several conversations (B) at once, padded on the left; raises what `prompt` raises.

        Returns:
            what `prompt` returns, images and videos in the order of the rows, and attention_mask (B, T) bool, True at
            real tokens.
        """
        if not isinstance(conversations, Sequence) or not conversations:
            raise ConfigError(
                f"messages: {conversations!r:.80} holds no conversations; expected at least one in a list"
            )
        rows, visuals = [], Visuals()
        for number, messages in enumerate(conversations):
            ids, shown = self._encode(messages, f"messages[{number}]")
            rows.append(ids)
            visuals.extend(shown)
        length = max(map(len, rows))
        input_ids = torch.full((len(rows), length), self.chat.pad_token_id)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for number, ids in enumerate(rows):
            input_ids[number, length - len(ids) :] = torch.tensor(ids)
            mask[number, length - len(ids) :] = True
        return {"input_ids": input_ids, "attention_mask": mask, **visuals.inputs()}

    def text(self, tokens: Tensor | list[int]) -> str:
        """Tokens as text, special ones left out."""
        return str(self.chat.tokenizer.decode(tokens, skip_special_tokens=True))

    @classmethod
    def _of(cls, chat: ChatFormat, images: ImageConfig, videos: VideoConfig) -> Processor:
        processor = ImageProcessor(images)
        return cls(chat, processor, VideoProcessor(processor, videos))

    @property
    def _videos(self) -> VideoProcessor:
        return self.videos or VideoProcessor(self.images)

    def _encode(self, messages: Messages, place: str) -> tuple[list[int], Visuals]:
        visuals = read_visuals(messages, self.images, self._videos, place)
        merge = self.images.config.merge_size
        counts = token_counts(visuals.image_grids, merge), token_counts(visuals.video_grids, merge)
        return self.chat.encode(messages, *counts, place=place, generation_prompt=True).input_ids, visuals
