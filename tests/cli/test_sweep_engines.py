"""The same study by every engine: submitit's local executor and Ray Tune come to the numbers of local processes."""

from __future__ import annotations

import json
from pathlib import Path

import cli_runs
import pytest
import sweep_runs
import torch
from sweep_runs import MIXER

STUDY = f"""
axes:
  {MIXER}
seeds: [0]
metrics: [val/exact]
"""
RECIPE = "{run: {threads: 1, test: false}, trainer: {max_steps: 4}}"
ENGINES = {
    "local": [],
    "slurm": ["--engine", "slurm", "--jobs", "2", "--slurm.cluster", "local", "--slurm.timeout_min=5"],
    "ray": ["--engine", "ray", "--jobs", "2"],
}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of the study's runs by engine."""
    root = tmp_path_factory.mktemp("engines")
    found = {}
    for engine, arguments in ENGINES.items():
        sweep_runs.write(root / engine, STUDY, RECIPE)
        assert "study: 2 of 2 done" in sweep_runs.swept(root / engine, *arguments)
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
    wrong = ["--engine", "slurm", "--slurm.cluster", "local", "--slurm.partitoin", "x"]
    _, error = sweep_runs.ended(sweep_runs.started(done["slurm"].parents[1], *wrong), 2)
    assert error.startswith("error: --slurm: ")
    assert "partitoin" in error


def test_settings_of_slurm_need_its_engine(done: dict[str, Path]) -> None:
    _, error = sweep_runs.ended(sweep_runs.started(done["local"].parents[1], "--slurm.partition", "x"), 2)
    assert error == "error: --slurm.partition: expected --engine slurm with it\n"
