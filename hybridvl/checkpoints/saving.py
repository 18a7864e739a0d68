"""Models saved into folders, in our own format or another project's; what a format cannot express is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hybridvl.checkpoints.checkpoint import EMBEDDING
from hybridvl.checkpoints.comparison import lost_options
from hybridvl.checkpoints.files import text_writer, usable_path, write_files
from hybridvl.checkpoints.formats import FORMATS, Format
from hybridvl.checkpoints.origin import Origin, origin_of
from hybridvl.checkpoints.tensor_files import INDEX, weight_files
from hybridvl.checkpoints.tensor_writing import in_file_order, make_header, make_index, split_shards, tensors_writer
from hybridvl.layers import ConfigError
from hybridvl.models.config import ModelConfig
from hybridvl.models.vlm import VisionLanguageModel

SHARD_SIZE = "5GB"
# What stands beside the weights and does not depend on them: tokenizer, templates, image settings, generation.
SIDE_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.json", "chat_template.jinja", "generation_config.json"),
    *("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"),
    "hybridvl_processor.json",
)


def save(
    model: VisionLanguageModel,
    path: str | Path,
    format: str = "hybridvl",
    max_shard_size: int | str | None = None,
) -> None:
    """Write a model into a folder: config.json and model.safetensors, or several files and their index.

    model: the model, or the transformers model around it. format: "hybridvl" (any model), "qwen2_5_vl", "infinitevl"
    or "mamba2". A model that was loaded from the same format keeps its files' names, shards, metadata and
    configuration, so that an unchanged model gives the same bytes; any other gets the layout of transformers. Tokenizer
    and processor files of the folder that the model was loaded from come along unless the folder has its own.
    max_shard_size: bytes in a file, or text like "5GB"; None keeps the files of the folder that the model was loaded
    from, else "5GB".

    All files are replaced together at the end. Raises ConfigError naming the layer or option that the format cannot
    express, or when the folder cannot be written (permissions, full disk); older files then are intact.
    """
    folder, model = usable_path(path), _unwrapped(model)
    write_model(model, folder, _side_files(origin_of(model), folder, format), format, max_shard_size)


def write_model(
    model: VisionLanguageModel,
    folder: Path,
    beside: Mapping[str, Path],
    format: str = "hybridvl",
    max_shard_size: int | str | None = None,
    dropped: Iterable[str] = (),
) -> None:
    """Write a model as `save` does, but with files of the caller's choice beside it.

    Args:
        beside: name in the folder -> the file that is copied there.
        dropped: names that are removed from the folder.
    """
    if format not in FORMATS:
        raise ConfigError(f"format: {format!r}; expected one of {', '.join(FORMATS)}")
    origin, tensors = origin_of(model), model.state_dict()
    if max_shard_size is None and origin is not None and origin.format == format and origin.fits(model.config, tensors):
        files = origin.writers(tensors)
    else:
        files = _writers(FORMATS[format], model, tensors, SHARD_SIZE if max_shard_size is None else max_shard_size)
    files |= {name: _copier(path) for name, path in beside.items()}
    write_files(folder, files, {*weight_files(folder), *dropped} - files.keys())


def _writers(
    format: Format, model: VisionLanguageModel, tensors: Mapping[str, Tensor], max_shard_size: int | str
) -> dict[str, Callable[[Path], object]]:
    """The files of a model in the layout of transformers."""
    values = config_values(format, model.config)
    if format.dtype_key is not None:
        dtype = tensors[EMBEDDING].dtype
        values = {**values, format.dtype_key: str(dtype).removeprefix("torch.")}
    shards = split_shards({format.theirs(name): tensor for name, tensor in tensors.items()}, max_shard_size)
    files: dict[str, Callable[[Path], object]] = {}
    for file, held in shards.items():
        ordered = in_file_order(held)
        header = make_header(ordered, {"format": "pt"})
        files[file] = tensors_writer(header, ordered.values(), [tensor.dtype for tensor in ordered.values()])
    if len(shards) > 1:
        files[INDEX] = text_writer(make_index(shards))
    return {**files, "config.json": text_writer(json.dumps(values, indent=2, sort_keys=True) + "\n")}


def config_values(format: Format, config: ModelConfig) -> dict[str, Any]:
    """config.json of a format, without the dtype; ConfigError unless reading it again gives the same configuration."""
    if format.write_config is None:
        known = ", ".join(name for name, entry in FORMATS.items() if entry.write_config is not None)
        raise ConfigError(f"format: {format.name!r} is only read; expected one of {known}")
    values = format.write_config(config)
    again = format.config(values, config.tie_embeddings, f"format {format.name!r}")
    lost = lost_options(config, again, format.ignored)
    if lost:
        raise ConfigError(f"format {format.name!r} cannot express {'; '.join(lost)}")
    return values


def _unwrapped(model: object) -> VisionLanguageModel:
    # The class for transformers keeps its model as an attribute. It is not imported here: transformers takes seconds.
    inner = getattr(model, "__dict__", {}).get("net", model)
    if not isinstance(inner, VisionLanguageModel):
        raise ConfigError(
            f"model: a {type(model).__name__}; expected a VisionLanguageModel, or the transformers model around one"
        )
    return inner


def _side_files(origin: Origin | None, folder: Path, format: str) -> dict[str, Path]:
    """What comes along from the folder that a model was loaded from, where `folder` has none of its own."""
    if origin is None:
        return {}
    code = [path.name for path in origin.folder.glob("*.py")] if origin.format == format else []
    found = [name for name in (*SIDE_FILES, *code) if (origin.folder / name).is_file()]
    return {name: origin.folder / name for name in found if not (folder / name).exists()}


def _copier(source: Path) -> Callable[[Path], object]:
    return lambda path: shutil.copyfile(source, path)
