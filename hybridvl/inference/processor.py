"""The text and image side of a trained model, kept in its folder: tokenizer, system turn, image settings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridvl.data.chat import ChatFormat, content_parts
from hybridvl.data.images import ImageConfig, ImageProcessor
from hybridvl.data.tokens import load_tokenizer
from hybridvl.layers.errors import ConfigError

FILE = "hybridvl_processor.json"


@dataclass(frozen=True)
class Processor:
    """Turns messages into model inputs and tokens into text.

    chat: the chat format with its tokenizer. images: how pictures become patches.
    """

    chat: ChatFormat
    images: ImageProcessor

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files and hybridvl_processor.json into a folder."""
        settings = {"system": self.chat.system, "images": dataclasses.asdict(self.images.config)}
        self.chat.tokenizer.save_pretrained(str(folder))
        (Path(folder) / FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Processor:
        """Read what `save` wrote; ConfigError when the folder has none or it is damaged."""
        path = Path(folder) / FILE
        if not path.is_file():
            raise ConfigError(f"{folder}: no {FILE}; expected the model folder of a run, for example RUN/model")
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            images = ImageConfig(**settings["images"])
            system = settings["system"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: damaged ({error})") from error
        return cls(ChatFormat(load_tokenizer(str(folder)), system), ImageProcessor(images))

    @property
    def stop_id(self) -> int:
        """The token that ends an answer."""
        return self.chat.tokenizer.get_vocab()["<|im_end|>"]

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """input_ids (1, T), and with images pixel_values (P, patch_dim) and image_grid_thw (images, 3), of a
        conversation that the model is to go on with."""
        pixels, grids = [], []
        for index, message in enumerate(messages):
            for part in content_parts(message.get("content"), f"messages[{index}]"):
                if part["type"] == "image":
                    rows, grid = self.images(part["image"], f"messages[{index}]")
                    pixels.append(rows)
                    grids.append(grid)
        merged = self.images.config.merge_size**2
        sizes = [t * h * w // merged for t, h, w in grids]
        ids = self.chat.encode(messages, sizes, generation_prompt=True).input_ids
        inputs = {"input_ids": torch.tensor([ids])}
        if pixels:
            inputs |= {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.tensor(grids)}
        return inputs

    def text(self, tokens: Tensor | list[int]) -> str:
        """Tokens as text, special ones left out."""
        return str(self.chat.tokenizer.decode(tokens, skip_special_tokens=True))
