"""The same study by every engine: submitit's local executor and Ray Tune come to the numbers of local processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cli_runs
import pytest
import torch

STUDY = """
name: study
root: runs
recipe: tiny.yaml
axes:
  mixer: {key: model.net.pattern, values: {hybrid: swa gdn, window: swa*2}}
seeds: [0]
metrics: [val/exact]
"""
ENGINES = {
    "local": [],
    "slurm": ["--engine", "slurm", "--jobs", "2", "--slurm.cluster", "local", "--slurm.timeout_min=5"],
    "ray": ["--engine", "ray", "--jobs", "2"],
}


def _sweep(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    recipe = cli_runs.recipe(folder, "tiny", "{run: {threads: 1, test: false}, trainer: {max_steps: 4}}")
    recipe.write_text(recipe.read_text().replace(str(folder), "."))
    (folder / "study.yaml").write_text(STUDY)
    return subprocess.run(
        [Path(sys.executable).parent / "hybridvl", "sweep", "study.yaml", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of the study's runs by engine."""
    root = tmp_path_factory.mktemp("engines")
    found = {}
    for engine, arguments in ENGINES.items():
        ended = _sweep(root / engine, *arguments)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert "study: 2 of 2 done" in ended.stdout
        found[engine] = root / engine / "runs" / "study"
    return found


@pytest.mark.parametrize("engine", ["slurm", "ray"])
def test_every_engine_comes_to_the_same_bits(done: dict[str, Path], engine: str) -> None:
    for cell in ("mixer=hybrid", "mixer=window"):
        runs = [done[name] / cell / "seed_0" for name in ("local", engine)]
        ends = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in runs]
        for end in ends:
            end["callbacks"]["Throughput"].pop("seconds")
        assert ends[0]["global_step"] == 4
        assert cli_runs.differences(*ends) == []
        facts = [json.loads((run / "metrics.json").read_text()) for run in runs]
        assert facts[0]["metrics"] == facts[1]["metrics"]
        assert json.loads(runs[1].with_name("seed_0.json").read_text())["attempts"] == 1


def test_tune_leaves_no_event_files_of_its_own(done: dict[str, Path]) -> None:
    """TensorBoard would show them as further runs."""
    found = {path.parent.relative_to(done["ray"]).as_posix() for path in done["ray"].rglob("events.*")}
    assert found == {"mixer=hybrid/seed_0", "mixer=window/seed_0"}


def test_what_submitit_does_not_know_is_refused(done: dict[str, Path]) -> None:
    ended = _sweep(done["slurm"].parents[1], "--engine", "slurm", "--slurm.cluster", "local", "--slurm.partitoin", "x")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: --slurm: ")
    assert "partitoin" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_settings_of_slurm_need_its_engine(done: dict[str, Path]) -> None:
    ended = _sweep(done["local"].parents[1], "--slurm.partition", "x")
    assert ended.returncode == 2
    assert ended.stderr == "error: --slurm.partition: expected --engine slurm with it\n"
