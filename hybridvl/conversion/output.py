"""The folder of a converted model, with the files of the source that do not depend on its weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from hybridvl.checkpoints.files import usable_path
from hybridvl.checkpoints.saving import SIDE_FILES, write_model
from hybridvl.checkpoints.tensor_files import INDEX
from hybridvl.layers import ConfigError
from hybridvl.models.vlm import VisionLanguageModel


def check_folder(folder: Path, source: Path, force: bool = False) -> None:
    """Raise ConfigError unless a converted model may be written to a folder: a new one, an empty one, or with force
    one of anything but the source."""
    usable_path(folder)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: is a file; expected the name of a folder to write")
    if folder.exists() and folder.resolve() == source.resolve():
        raise ConfigError(f"{folder}: is the source itself; expected another folder")
    if folder.exists() and any(folder.iterdir()) and not force:
        raise ConfigError(f"{folder}: is not empty; expected a new or empty folder, or --force to replace its model")


def check_report(path: Path, folders: Iterable[Path]) -> None:
    """Raise ConfigError for a report that would be written in the place of a model's file in one of the folders."""
    place = path.resolve()
    models = place.suffix == ".safetensors" or place.name in ("config.json", INDEX, *SIDE_FILES)
    if models and place.parent in [folder.resolve() for folder in folders]:
        raise ConfigError(f"--json: {path} is a file of the model; expected another name for the report")


def write_folder(
    model: VisionLanguageModel, folder: Path, source: Path, format: str = "hybridvl", force: bool = False
) -> list[str]:
    """Write a model with the source's tokenizer, chat template, processor and generation files; returns their names.

    With force, the model that is there already is replaced; files that belong to no model stay.

    Raises:
        ConfigError: see `check_folder`; a format that cannot express the model, or a folder that cannot be written,
            both before anything in the folder is changed.
    """
    check_folder(folder, source, force)
    copied = {name: source / name for name in SIDE_FILES if (source / name).is_file()}
    write_model(model, folder, copied, format, dropped=SIDE_FILES)
    return list(copied)
