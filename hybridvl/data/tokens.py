"""Tokenizers: the small built-in byte-level BPE, any Hugging Face tokenizer by name or folder, and tiktoken files."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from itertools import pairwise
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

QWEN_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
"""Qwen2.5-VL's tokens beyond its vocabulary, from 151643 on; those after <|video_pad|> are not special."""

# Qwen's: contractions, words with at most one sign before them, single digits, signs, line breaks, other spaces.
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

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
    """The tokenizer called `name_or_path`: "builtin", a folder, a .tiktoken file, or the id of a Hugging Face model.

    A folder has tokenizer.json, or vocab.json and merges.txt.

    Raises:
        ConfigError: it cannot be found, is not a fast tokenizer, or lacks a token of the chat format.
    """
    from transformers import PreTrainedTokenizerFast

    if name_or_path == BUILTIN:
        return PreTrainedTokenizerFast.from_pretrained(BUILTIN_FOLDER)
    if name_or_path.endswith(".tiktoken"):
        return from_tiktoken(name_or_path)
    try:
        tokenizer = _from_pretrained(name_or_path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"tokenizer {name_or_path!r} cannot be loaded: {reason}; expected {BUILTIN!r}, a folder with "
            "tokenizer.json or with vocab.json and merges.txt, a .tiktoken file, or the id of a Hugging Face model"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(f"tokenizer {name_or_path!r} has no tokenizer.json; expected a fast tokenizer")
    known = tokenizer.get_vocab()
    missing = [token for token in SPECIAL_TOKENS if token not in known]
    if missing:
        raise ConfigError(f"tokenizer {name_or_path!r} lacks {', '.join(missing)}; expected Qwen2.5-VL's chat tokens")
    return tokenizer


def from_tiktoken(path: str | Path) -> PreTrainedTokenizerFast:
    """Qwen2.5-VL's tokenizer made from the vocabulary in a tiktoken file, such as `qwen.tiktoken`.

    The file's tokens keep their numbers; QWEN_TOKENS follow them, with the published numbers when the file is Qwen's.
    A token is merged from the two tokens into which byte-pair merging with the tokens before it takes its bytes.

    Raises:
        ConfigError: the file cannot be read, or is no vocabulary of a byte-level BPE.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ranks = _read_ranks(Path(path))
    letters = _byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [(spelled[left], spelled[right]) for left, right in _merges(ranks)]
    tokenizer = Tokenizer(models.BPE({text: ranks[token] for token, text in spelled.items()}, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = QWEN_TOKENS[: QWEN_TOKENS.index("<|video_pad|>") + 1]
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=name in special) for name in QWEN_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=131_072,
    )


def _from_pretrained(name_or_path: str) -> object:
    """A folder's tokenizer by the files that are in it, without the model's config.json; else the hub's."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

    folder = Path(name_or_path)
    if (folder / "tokenizer.json").is_file():
        # What is no JSON is told here: the tokenizers package would raise a bare Exception.
        json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        return PreTrainedTokenizerFast.from_pretrained(folder)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return Qwen2Tokenizer.from_pretrained(folder)
    if folder.is_dir():
        raise ConfigError("neither tokenizer.json nor vocab.json and merges.txt in it")
    return AutoTokenizer.from_pretrained(name_or_path)


def _read_ranks(path: Path) -> dict[bytes, int]:
    """The tokens of a tiktoken file, each a line of its bytes in base64 and its number, by number."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
        ranks = {
            base64.b64decode(token, validate=True): int(rank) for token, rank in map(str.split, filter(None, lines))
        }
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"tokenizer {path}: no tiktoken file ({error}); expected lines of base64 and number"
        ) from error
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise ConfigError(f"tokenizer {path}: expected tokens numbered from 0 without a gap, among them all bytes")
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """For every token of several bytes, in order, the two tokens that are merged to it."""
    merges = []
    for token, rank in ranks.items():
        if len(token) == 1:
            continue
        halves = [
            (token[:cut], token[cut:])
            for cut in range(1, len(token))
            if ranks.get(token[:cut], rank) < rank and ranks.get(token[cut:], rank) < rank
        ]
        if len(halves) > 1:
            parts = _merge_below(token, ranks, rank)
            halves = [(parts[0], parts[1])] if len(parts) == 2 else []
        merges += halves
    return merges


def _merge_below(text: bytes, ranks: Mapping[bytes, int], limit: int) -> list[bytes]:
    """The tokens that byte-pair merging makes of some bytes with the tokens numbered below `limit`."""
    parts = [bytes([byte]) for byte in text]
    while True:
        joined = [ranks.get(left + right, limit) for left, right in pairwise(parts)]
        best = min(joined, default=limit)
        if best >= limit:
            return parts
        place = joined.index(best)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def _byte_letters() -> list[str]:
    """How byte-level BPE spells each byte: printable ones as themselves, the others by letters from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


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
