"""`hybridvl generate`: replies of a model to prompts about images and videos, printed as they are written."""

from __future__ import annotations

import argparse
import os
import stat
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from hybridvl.checkpoints import load, read_config
from hybridvl.cli.arguments import Arguments
from hybridvl.cli.computing import DTYPES, runner_notes, runner_of, use_threads
from hybridvl.cli.replying import (
    add_reply_flags,
    model_folder,
    require_output,
    require_text,
    sampling_of,
    write_text,
)
from hybridvl.inference.processor import Processor
from hybridvl.inference.replies import Rates, ReplyPiece, stream_replies
from hybridvl.layers.errors import ConfigError
from hybridvl.models.config import ModelConfig
from hybridvl.models.generation import PREFILL_CHUNK, check_request


def main(argv: Sequence[str]) -> int:
    """Reply to the prompts in `argv`; returns the exit status."""
    options = _parser().parse_args(argv)
    # Everything that can be wrong is looked at before the weights are read, which may take minutes.
    require_output()
    prompts = _prompts(options)
    folder = model_folder(options.model)
    check_request(options.max_new_tokens, options.chunk)
    use_threads(options)
    config = read_config(folder)
    _check_media(options, config)
    processor = Processor.load(folder)
    sampling = sampling_of(options, folder, processor)
    conversations = [_conversation(options, prompt) for prompt in prompts]
    inputs = processor.prompt(conversations[0]) if len(prompts) == 1 else processor.batch(conversations)
    _check_inputs(inputs, config, options.max_context)
    model = load(folder, device=options.device, dtype=DTYPES.get(options.dtype))
    runner = runner_of(options, model)
    pieces = stream_replies(
        model, processor, inputs, options.max_new_tokens, sampling, options.stop, options.chunk, runner
    )
    rates = _show(pieces, prompts)
    if rates is not None and not options.quiet and sys.stderr is not None:
        print("\n".join([_rates_line(rates), *runner_notes(options, runner)]), file=sys.stderr)
    return 0


def _prompts(options: argparse.Namespace) -> list[str]:
    prompts = list(options.prompt)
    if options.prompt_file is not None:
        text = _prompt_file(options.prompt_file).removeprefix("\N{BYTE ORDER MARK}")
        prompts += [line for line in text.split("\n") if line.strip()]
    if not prompts:
        raise ConfigError("--prompt: no prompt given; expected --prompt TEXT or a --prompt-file with one a line")
    for name, text in [*(("--prompt", prompt) for prompt in prompts), ("--system", options.system or "")]:
        require_text(name, text)
    return prompts


def _prompt_file(path: str) -> str:
    if path == "-" and sys.stdin is None:
        raise ConfigError("--prompt-file: - cannot be read: standard input is closed")
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompt-file: {path} cannot be read: {error}") from error


def _check_media(options: argparse.Namespace, config: ModelConfig) -> None:
    if options.fps is not None and not 0 < options.fps < float("inf"):
        raise ConfigError(f"--fps: {options.fps}; expected a number of frames per second above 0")
    for kind, path in options.media:
        if config.vision is None:
            raise ConfigError(f"--{kind}: {path} given to a model without a vision tower; expected prompts alone")
        try:
            mode = os.stat(path).st_mode
        except OSError as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
            raise ConfigError(f"--{kind}: {path} cannot be read: {reason}") from error
        if not stat.S_ISREG(mode):
            # Pictures and videos are read back and forth, which a pipe does not allow.
            reason = "is a folder" if stat.S_ISDIR(mode) else "is a device or a pipe; expected a regular file"
            raise ConfigError(f"--{kind}: {path} cannot be read: {reason}")


def _conversation(options: argparse.Namespace, prompt: str) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = []
    for kind, path in options.media:
        part: dict[str, Any] = {"type": kind, kind: path}
        if kind == "video" and options.fps is not None:
            part["fps"] = options.fps
        content.append(part)
    content.append({"type": "text", "text": prompt})
    system = [] if options.system is None else [{"role": "system", "content": options.system}]
    return [*system, {"role": "user", "content": content}]


def _check_inputs(inputs: dict[str, Tensor], config: ModelConfig, max_context: int | None) -> None:
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    longest = ids.shape[1] if mask is None else int(mask.ne(0).sum(1).max())
    if max_context is not None and longest > max_context:
        raise ConfigError(f"--max-context: the prompt has {longest} tokens; expected at most {max_context}")
    if int(ids.max()) >= config.vocab_size:
        raise ConfigError(
            f"the tokenizer gives token {int(ids.max())}, the model knows tokens below {config.vocab_size}; "
            "expected the tokenizer that the model was trained with"
        )


def _show(pieces: Iterable[ReplyPiece], prompts: Sequence[str]) -> Rates | None:
    """Print one reply after the other, each as it is written: later rows wait for the earlier ones."""
    waiting, finished, current, rates = [""] * len(prompts), set(), 0, None
    write_text(_heading(prompts, current))
    for piece in pieces:
        rates = piece.rates
        if piece.row == current:
            write_text(piece.text)
        else:
            waiting[piece.row] += piece.text
        if piece.finish_reason:
            finished.add(piece.row)
        while current in finished:
            current += 1
            write_text("\n")
            if current < len(prompts):
                write_text(_heading(prompts, current) + waiting[current])
    return rates


def _heading(prompts: Sequence[str], row: int) -> str:
    if len(prompts) == 1:
        return ""
    return ("\n" if row else "") + f"[{row + 1}/{len(prompts)}] {prompts[row]}\n"


def _rates_line(rates: Rates) -> str:
    return (
        f"prompt {rates.prompt_tokens:,} tokens, prefill {rates.prefill_rate:,.1f} tokens/s, "
        f"decode {rates.decode_rate:,.1f} tokens/s, state {rates.state_bytes:,} bytes"
    )


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="hybridvl generate",
        description="Reply to prompts about images and videos.",
        epilog="example: hybridvl generate runs/digits/version_0 --image page.png --prompt 'What is on line 2?'",
    )
    add = parser.add_argument
    add("model", metavar="DIR", help="a run folder, or a model folder: ours, Qwen2.5-VL's or InfiniteVL's")
    add("--prompt", action="append", default=[], metavar="TEXT", help="what to ask; repeat it for a batch")
    add("--prompt-file", metavar="FILE", help="prompts, one a line ('-' reads standard input)")
    add("--system", metavar="TEXT", help="the system turn (default: the one of the model's folder)")
    media: dict[str, Any] = {"action": "append", "dest": "media", "default": [], "metavar": "FILE"}
    add("--image", type=_image, help="a picture; images and videos come before the prompt, in this order", **media)
    add("--video", type=_video, help="a video", **media)
    add("--fps", type=float, metavar="X", help="frames per second that are taken from videos")
    add_reply_flags(parser)
    add("--chunk", type=int, default=PREFILL_CHUNK, metavar="N", help="prompt tokens at a time (default %(default)s)")
    add("--max-context", type=int, metavar="N", help="refuse prompts of more tokens")
    return parser


def _image(path: str) -> tuple[str, str]:
    return "image", path


def _video(path: str) -> tuple[str, str]:
    return "video", path
