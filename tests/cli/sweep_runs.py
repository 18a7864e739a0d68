"""Studies of a recipe that trains in a second, and `hybridvl sweep` of them as a process, which can be made to fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cli_runs

MIXER = "mixer: {key: model.net.pattern, values: {hybrid: swa gdn, window: swa*2}}"


def write(folder: Path, study: str, recipe: str) -> None:
    """A study named "study" and its recipe in a folder, which they say nothing about.

    Args:
        folder: where.
        study: YAML of its axes and all that follows.
        recipe: YAML that is merged into the recipe.
    """
    folder.mkdir(exist_ok=True)
    path = cli_runs.recipe(folder, "tiny", recipe)
    path.write_text(path.read_text().replace(str(folder), "."))
    (folder / "study.yaml").write_text(f"name: study\nroot: runs\nrecipe: tiny.yaml\n{study}")


def started(folder: Path, *arguments: str, fault: str | None = None) -> subprocess.Popen[str]:
    """A sweep of the study in a folder; `fault` is for disk_faults.Ended."""
    paths = os.pathsep.join([str(folder), str(Path(__file__).parent), *sys.path])
    own = {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [Path(sys.executable).parent / "hybridvl", "sweep", "study.yaml", *arguments],
        cwd=folder,
        env={**os.environ, **own, **({} if fault is None else {"HYBRIDVL_TEST_FAULT": fault})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str], status: int = 0) -> tuple[str, str]:
    """Standard output and error of a sweep that must end with a status, and with no traceback."""
    out, err = process.communicate(timeout=250)
    assert process.returncode == status, out + err
    assert "Traceback" not in err
    return out, err


def swept(folder: Path, *arguments: str, status: int = 0, fault: str | None = None) -> str:
    """What a sweep has printed that must end with a status."""
    return ended(started(folder, *arguments, fault=fault), status)[0]
