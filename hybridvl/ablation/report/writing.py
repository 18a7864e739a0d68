"""The files of a report in one folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hybridvl.ablation.report.analysis import Analysis
from hybridvl.ablation.report.exports import cells_csv, runs_csv, to_json
from hybridvl.ablation.report.figures import draw_all
from hybridvl.ablation.report.markdown import markdown
from hybridvl.ablation.report.page import page
from hybridvl.checkpoints.files import parse_json, read_text, text_writer, write_files
from hybridvl.layers.errors import ConfigError

CACHE = ".read.npz"
_JSON = "report.json"


def write_report(analysis: Analysis, folder: Path) -> list[Path]:
    """Write all files of a report, replacing those of an earlier one, of which no picture is left; returns them.

    Raises:
        ConfigError: the folder cannot be written.
    """
    pictures = draw_all(analysis)
    texts = {
        "report.html": page(analysis, pictures),
        "report.md": markdown(analysis, pictures),
        "report.csv": runs_csv(analysis),
        "cells.csv": cells_csv(analysis),
        _JSON: to_json(analysis, [picture.name for picture in pictures]),
    }
    files: dict[str, Callable[[Path], object]] = {name: text_writer(text) for name, text in texts.items()}
    files |= {picture.name: partial(Path.write_bytes, data=picture.data) for picture in pictures}
    stale = [name for name in _earlier_pictures(folder / _JSON) if name not in files]
    write_files(folder, files, stale)
    return [folder / name for name in files]


def _earlier_pictures(path: Path) -> Sequence[str]:
    """The pictures of the report that is there now, by its own account."""
    try:
        figures: Any = parse_json(read_text(path), path).get("figures")
    except ConfigError:
        return []
    names = figures if isinstance(figures, list) else []
    return [name for name in names if isinstance(name, str) and name.endswith(".png") and "/" not in name]
