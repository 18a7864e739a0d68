"""The files of a report in one folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hybridvl.ablation.report.analysis import Analysis
from hybridvl.ablation.report.markdown import markdown
from hybridvl.ablation.report.tables import cells_csv, runs_csv, to_json
from hybridvl.checkpoints.files import text_writer, write_files

CACHE = ".read.npz"


def write_report(analysis: Analysis, folder: Path) -> list[Path]:
    """Write all files of a report, replacing those of an earlier one; returns them.

    Raises:
        ConfigError: the folder cannot be written.
    """
    files: dict[str, Callable[[Path], object]] = {
        "report.md": text_writer(markdown(analysis, {})),
        "report.csv": text_writer(runs_csv(analysis)),
        "cells.csv": text_writer(cells_csv(analysis)),
        "report.json": text_writer(to_json(analysis)),
    }
    write_files(folder, files)
    return [folder / name for name in files]
