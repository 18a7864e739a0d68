"""Tokenizers: the small built-in byte-level BPE, and any Hugging Face tokenizer by name or folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from hybridvl.layers.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BUILTIN = "builtin"
"""The name under which `load_tokenizer` knows the tokenizer that comes with the package."""

BUILTIN_FOLDER = Path(__file__).parent / "tokenizer"

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Tokens of the chat format that every tokenizer used here must have; the built-in one numbers them from 0."""

# One digit is one token and no merge crosses a word, so numbers are read digit by digit as in Qwen's tokenizer.
_WORDS = r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_CORPUS = (
    "system\nYou are a helpful assistant.",
    "user\n",
    "assistant\n",
    "What is on line 2?",
    "Which digit is at row 3, column 1?",
    "How many 7s?",
    "Read the page.",
    "what color is the shape? what is the color of the circle? what is the blue shape?",
    "does the image contain a rectangle? does the image not contain a triangle? is there not a teal shape?",
    "is no gray shape present? is there a red shape in the image? is a black shape present?",
    "what shape is in the image? what shape does the image contain?",
    *("circle", "rectangle", "triangle", "yes", "no"),
    *("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
    " circle rectangle triangle yes no black blue brown gray green red teal yellow",
)

_GENERIC = (
    "The quick brown fox jumps over the lazy dog, and then it goes back to where it came from.",
    "A picture is shown to the model; the model reads it and answers in a few words.",
    "Please describe what you see. There are two people and one animal near the water.",
    "In which year was this made, and by whom? It was not written on the other side.",
    "Numbers, names and dates are to be read as they stand: left to right, top to bottom.",
)


def load_tokenizer(name_or_path: str = BUILTIN) -> PreTrainedTokenizerFast:
    """The tokenizer called `name_or_path`: "builtin", a folder, or the id of a Hugging Face model.

    Raises:
        ConfigError: it cannot be found, is not a fast tokenizer, or lacks a token of the chat format.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if name_or_path == BUILTIN:
        return PreTrainedTokenizerFast.from_pretrained(BUILTIN_FOLDER)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"tokenizer {name_or_path!r} cannot be loaded: {reason}; "
            f"expected {BUILTIN!r}, a folder with tokenizer.json or the id of a Hugging Face model"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(f"tokenizer {name_or_path!r} has no tokenizer.json; expected a fast tokenizer")
    known = tokenizer.get_vocab()
    missing = [token for token in SPECIAL_TOKENS if token not in known]
    if missing:
        raise ConfigError(f"tokenizer {name_or_path!r} lacks {', '.join(missing)}; expected Qwen2.5-VL's chat tokens")
    return tokenizer


def train_builtin(folder: Path = BUILTIN_FOLDER, vocab_size: int = 512) -> None:
    """Make the built-in tokenizer again from the built-in tasks' text and write its files into `folder`.

    Byte-level, so that any text can be encoded; at most `vocab_size` tokens, the special ones first.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # The tasks' words are repeated so that each of them becomes one token before generic English is merged.
    tokenizer.train_from_iterator([*_CORPUS * 20, *_GENERIC], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    train_builtin()
