"""`hybridvl export`: a checkpoint of a run, in shards or not, as a model folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from hybridvl.checkpoints import save
from hybridvl.checkpoints.files import read_text
from hybridvl.checkpoints.formats import FORMATS
from hybridvl.cli.arguments import Arguments
from hybridvl.conversion.output import check_folder
from hybridvl.data.chat import ChatFormat
from hybridvl.data.checks import from_settings
from hybridvl.data.images import ImageConfig, ImageProcessor
from hybridvl.data.tokens import load_tokenizer
from hybridvl.data.video import VideoConfig, VideoProcessor
from hybridvl.inference.processor import Processor
from hybridvl.layers.errors import ConfigError, within

_WRITTEN = [name for name, format in FORMATS.items() if format.write_config is not None]


def main(argv: Sequence[str]) -> int:
    """Write the folder; returns 0. Mistakes are ConfigErrors."""
    options = _parser().parse_args(argv)
    checkpoint, folder = Path(options.checkpoint), Path(options.out)
    check_folder(folder, checkpoint, options.force)
    recipe = checkpoint.resolve().parent.parent / "config.yaml"
    settings = _settings(recipe) if recipe.is_file() else {}
    source = options.source or (settings.get("model") or {}).get("source")
    from hybridvl.training.checkpoints.model import checkpoint_model  # Lightning takes seconds to import

    model = checkpoint_model(checkpoint, source)
    processor = _processor(settings["data"], recipe) if "data" in settings else None
    save(model, folder, options.format)
    beside = "without a tokenizer: the checkpoint lies in no run folder" if processor is None else "with its tokenizer"
    if processor is not None:
        processor.save(folder)
    print(f"{model.pattern}, {model.num_params:,} parameters, written to {folder}, {beside}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="hybridvl export",
        description="Turn a checkpoint of a fit, one file or a folder of shards, into a model folder: configuration, "
        "safetensors and, for a checkpoint in its run folder, tokenizer and image settings. A fit that has ended has "
        "such a folder already.",
        epilog="example: hybridvl export runs/digits/version_0/checkpoints/last.ckpt --out model",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="file or folder")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to write")
    parser.add_argument(
        "--source", metavar="DIR", help="model that adapters are merged into; default: the run's model.source"
    )
    parser.add_argument("--format", choices=_WRITTEN, default="hybridvl", help="of the folder (default hybridvl)")
    parser.add_argument("--force", action="store_true", help="replace the model of a folder that is not empty")
    return parser


def _settings(recipe: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(read_text(recipe))
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{recipe}: {error}; expected the YAML that a fit has written") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{recipe}: holds a {type(values).__name__}; expected the mapping that a fit has written")
    return values


def _processor(data: Any, recipe: Path) -> Processor:
    """Tokenizer, chat format and image settings of a run."""
    if not isinstance(data, dict):
        raise ConfigError(f"{recipe}: data: {data!r:.80}; expected a mapping")
    with within(f"{recipe}: data"):
        images = ImageProcessor(from_settings(ImageConfig, data.get("images", {}), "images"))
        videos = VideoProcessor(images, from_settings(VideoConfig, data.get("videos", {}), "videos"))
        return Processor(ChatFormat(load_tokenizer(str(data.get("tokenizer"))), data.get("system")), images, videos)
