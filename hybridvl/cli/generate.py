"""`hybridvl generate`: one answer of a trained model, printed as it is written."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from hybridvl.checkpoints.folders import load
from hybridvl.cli.arguments import Arguments
from hybridvl.inference.processor import Processor
from hybridvl.layers.errors import ConfigError
from hybridvl.models.generation import Sampling, generate
from hybridvl.models.vlm import VisionLanguageModel


def main(argv: Sequence[str]) -> int:
    """Answer the prompt in `argv`; returns the exit status."""
    options = _parser().parse_args(argv)
    folder = model_folder(options.model)
    model, processor = load(folder, device=options.device), Processor.load(folder)
    content: list[dict[str, Any]] = [{"type": "image", "image": path} for path in options.image]
    content.append({"type": "text", "text": options.prompt})
    sampling = Sampling(
        temperature=options.temperature, top_p=options.top_p, seed=options.seed, stop_ids=(processor.stop_id,)
    )
    for piece in answer(model, processor, [{"role": "user", "content": content}], options.max_new_tokens, sampling):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def model_folder(path: str) -> Path:
    """A model folder, or the model/ folder of a run folder; ConfigError when there is neither."""
    folder = Path(path)
    if (folder / "config.json").is_file():
        return folder
    if (folder / "model" / "config.json").is_file():
        return folder / "model"
    if not folder.is_dir():
        raise ConfigError(f"{path}: no such folder; expected a run folder or a model folder")
    raise ConfigError(f"{path}: neither config.json nor model/config.json in it; did the run finish?")


def answer(
    model: VisionLanguageModel,
    processor: Processor,
    messages: Sequence[dict[str, Any]],
    max_new_tokens: int,
    sampling: Sampling,
) -> Iterator[str]:
    """The reply to a conversation, piece by piece, as soon as each piece is certain."""
    inputs = {name: tensor.to(model.lm_head_weight.device) for name, tensor in processor.prompt(messages).items()}
    embeds = model.embed(**inputs)
    positions, _ = model.rope_positions(inputs["input_ids"], inputs.get("image_grid_thw"))
    written: list[int] = []
    shown = ""
    for step in generate(model, embeds, positions, None, max_new_tokens, sampling):
        if bool(step.finished[0]):
            break
        written.append(int(step.tokens[0]))
        text = processor.text(written)
        # A character of several bytes decodes to U+FFFD until its last byte is there.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text.removeprefix(shown)
            shown = text
    yield processor.text(written).removeprefix(shown)


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="hybridvl generate",
        description="Answer a prompt about images.",
        epilog="example: hybridvl generate runs/digits/version_0 --image page.png --prompt 'What is on line 2?'",
    )
    parser.add_argument("model", metavar="DIR", help="a run folder, or a folder with config.json and model.safetensors")
    parser.add_argument("--prompt", required=True, help="what to ask")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="a picture; repeat the flag for more, in order"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="longest answer (default 64)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="X",
        help="0 takes the most likely token (default), more draws",
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X", help="draw among this share of probability")
    parser.add_argument("--seed", type=int, default=None, help="seed of the draws")
    parser.add_argument("--device", type=_device, default="cpu", help="cpu (default), cuda, cuda:1, ...")
    return parser


def _device(name: str) -> str:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{name!r} cannot be used: {reason}") from error
    return name
