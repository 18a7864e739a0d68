"""What commands that write replies share: flags of the model and of decoding, and text that is safe to print."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from hybridvl.checkpoints.checkpoint import checkpoint_folder
from hybridvl.checkpoints.files import parse_json, read_text
from hybridvl.cli.computing import add_model_flags
from hybridvl.inference.processor import Processor
from hybridvl.layers.errors import ConfigError
from hybridvl.models.sampling import Sampling

# What a model writes must not command a terminal: everything but tab and new line among the control characters.
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\N{REPLACEMENT CHARACTER}")


def model_folder(path: str) -> Path:
    """A model folder, the model/ folder of a run folder, or where a hub id was stored; ConfigError if none of them."""
    folder = Path(path)
    for place in (folder, folder / "model"):
        if os.path.isfile(place / "config.json"):  # unlike Path.is_file, False for names that no file can have
            return place
    if not os.path.isdir(folder):
        return checkpoint_folder(path)
    raise ConfigError(f"{path}: neither config.json nor model/config.json in it; did the run finish?")


def add_reply_flags(parser: argparse.ArgumentParser) -> None:
    """How replies are decoded, and what computes them; see `sampling_of`."""
    add = parser.add_argument
    add("--max-new-tokens", type=int, default=64, metavar="N", help="longest reply (default 64)")
    greedy = "0 takes the most likely token (default), more draws"
    add("--temperature", type=float, default=0.0, metavar="X", help=greedy)
    add("--top-k", type=int, default=0, metavar="N", help="draw among the N most likely tokens (0: all)")
    add("--top-p", type=float, default=1.0, metavar="X", help="draw among this share of probability")
    add("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1 avoids tokens already there")
    add("--stop", action="append", default=[], metavar="TEXT", help="end a reply before this text; may be repeated")
    add("--seed", type=int, default=None, help="seed of the draws")
    add_model_flags(parser)
    add("--quiet", action="store_true", help="no line of rates on standard error")


def sampling_of(options: argparse.Namespace, folder: Path, processor: Processor) -> Sampling:
    """What the flags say; a reply ends with the turn, and where the model's folder says that one ends."""
    return Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
        stop_ids=_stop_ids(folder, processor),
    )


def printable(text: str) -> str:
    """The text without what commands a terminal, and without what is no text."""
    return text.encode("utf-8", "replace").decode().translate(_CONTROLS)


def write_text(text: str) -> None:
    """Print a piece of a reply at once."""
    if sys.stdout.isatty():
        text = text.translate(_CONTROLS)
    # Where the output is not UTF-8, "?" stands for what it does not know.
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def require_output() -> None:
    """Raise ConfigError where there is nothing to print a reply to."""
    if sys.stdout is None:
        raise ConfigError("standard output: closed; expected a terminal, a file or a pipe for the reply")


def require_text(flag: str, text: str) -> None:
    """Raise ConfigError for a text of the command line that is none."""
    if text.encode("utf-8", "ignore").decode() != text:
        raise ConfigError(f"{flag}: {text!r:.80} is not UTF-8")


def _stop_ids(folder: Path, processor: Processor) -> tuple[int, ...]:
    """The end of a turn, and what generation_config.json calls the end where a folder has one."""
    path, stops = folder / "generation_config.json", [processor.stop_id]
    if path.is_file():
        ends = parse_json(read_text(path), path).get("eos_token_id")
        stops += [end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int)]
    return tuple(dict.fromkeys(stops))
