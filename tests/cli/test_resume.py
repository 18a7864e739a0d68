"""A run killed in mid-training and resumed is the uninterrupted run, to the last bit."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import cli_runs
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hybridvl import load
from hybridvl.cli import main

NAME = "decoder.embed_tokens.weight"
KILLED = "trainer: {callbacks: [{class_path: disk_faults.KilledWhileSaving}]}"


def _fit_and_die(recipe: Path) -> None:
    """Fit in a process of its own until it kills itself with SIGKILL while writing its second checkpoint.

    This returns when the last process that holds the output has ended, so it also shows that no worker is left behind.
    """
    code = "import sys; from hybridvl.cli import main; sys.exit(main(sys.argv[1:]))"
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code, "fit", "--config", str(recipe)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def _losses(folder: Path) -> dict[int, float]:
    """Training loss by step; of a step taken twice, the later one."""
    values: dict[int, tuple[float, float]] = {}
    for file in folder.glob("events.*"):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        for event in events.Scalars("train/loss") if "train/loss" in events.Tags()["scalars"] else ():
            values[event.step] = max(values.get(event.step, (0.0, 0.0)), (event.wall_time, event.value))
    return {step: value for step, (_, value) in sorted(values.items())}


@pytest.mark.parametrize(("pattern", "packing"), [("(swa gdn)", False), ("(full mamba2)", True)])
def test_killed_and_resumed_is_uninterrupted(pattern: str, packing: bool, tmp_path: Path) -> None:
    lines = [
        f"model: {{net: {{pattern: '{pattern}'}}}}",
        f"data: {{packing: {str(packing).lower()}, workers: 1}}",
        "run: {test: false}",
    ]
    settings = "\n".join(lines)
    whole = cli_runs.recipe(tmp_path, "whole", settings)
    assert main(["fit", "--config", str(whole)]) == 0

    killed = cli_runs.recipe(tmp_path, "killed", f"{settings}\n{KILLED}")
    _fit_and_die(killed)
    folder = tmp_path / "runs" / "killed" / "version_0"
    unfinished, last = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert re.fullmatch(r"\.last\.ckpt\.[\w-]+\.\d+\.tmp", unfinished)
    assert last == "last.ckpt"
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4

    argv = ["fit", "--config", str(killed), "--ckpt_path", "last", "--trainer.callbacks", "null"]
    assert "KilledWhileSaving" in (folder / "config.yaml").read_text()
    assert main(argv) == 0
    assert "KilledWhileSaving" not in (folder / "config.yaml").read_text()
    assert [path.name for path in folder.parent.iterdir()] == ["version_0"]
    assert not (folder / "checkpoints" / unfinished).exists()

    other = tmp_path / "runs" / "whole" / "version_0"
    ends = [torch.load(path / "checkpoints" / "last.ckpt", weights_only=True) for path in (other, folder)]
    for end in ends:
        end["callbacks"]["Throughput"].pop("seconds")
    assert ends[0]["global_step"] == 12
    # Weights, optimizer, schedule, generators, loops, data position: everything a checkpoint holds.
    assert cli_runs.differences(*ends) == []
    assert _losses(folder) == _losses(other)
    assert len(_losses(other)) == 12


def test_a_finished_run_that_is_resumed_exports_its_best_weights_again(tmp_path: Path) -> None:
    # The loss falls, so its highest value is not the last one.
    best = "checkpoints: {monitor: val/loss, mode: max}\nrun: {test: false}"
    recipe = cli_runs.recipe(tmp_path, text=best)
    assert main(["fit", "--config", str(recipe)]) == 0
    folder = tmp_path / "runs" / "tiny" / "version_0"
    weights = folder / "model" / "model.safetensors"
    before = weights.read_bytes()
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert not torch.equal(load(folder / "model").state_dict()[NAME], last[f"net.{NAME}"])
    weights.unlink()
    assert main(["fit", "--config", str(recipe), "--ckpt_path", "last"]) == 0
    assert weights.read_bytes() == before
