"""A run killed in mid-training and resumed is the uninterrupted run, to the last bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import cli_runs
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hybridvl import load
from hybridvl.checkpoints.files import temporary_path
from hybridvl.cli import main

NAME = "decoder.embed_tokens.weight"
KILLED = "trainer: {callbacks: [{class_path: disk_faults.KilledWhileSaving}]}"


def _fit_and_die(recipe: Path) -> None:
    """Fit in a process of its own until it kills itself with SIGKILL.

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


def _scalars(folder: Path, tag: str = "train/loss") -> dict[int, float]:
    """A metric by step; of a step taken twice, the later one."""
    values: dict[int, tuple[float, float]] = {}
    for file in folder.glob("events.*"):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        for event in events.Scalars(tag) if tag in events.Tags()["scalars"] else ():
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
    process = int(unfinished.split(".")[-2])
    assert (unfinished, last) == (temporary_path(Path("last.ckpt"), process=process).name, "last.ckpt")
    assert process != os.getpid()
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
    assert _scalars(folder) == _scalars(other)
    assert len(_scalars(other)) == 12


BY_STEPS = "{max_steps: 12, check_val_every_n_epoch: null, val_check_interval: 6}"
BY_EPOCHS = "{max_steps: -1, max_epochs: 3, check_val_every_n_epoch: 1, val_check_interval: null}"  # of five steps
IN_PARTS = "{max_steps: 6, check_val_every_n_epoch: null, val_check_interval: 8, accumulate_grad_batches: 2}"


@pytest.mark.parametrize(
    ("trainer", "every", "hook", "step"),
    [
        (BY_STEPS, 3, "on_validation_batch_end", 6),  # a step at which last.ckpt is due, too
        (BY_STEPS, 6, "on_validation_batch_end", 12),  # the last one
        (BY_STEPS, 4, "on_test_batch_start", 12),  # nothing is left to train
        (BY_EPOCHS, 5, "on_train_batch_end", 11),  # saved at the end of an epoch
        (IN_PARTS, 2, "on_validation_batch_end", 4),  # between the two batches of step 5
    ],
)
def test_killed_beside_training_is_uninterrupted(
    trainer: str, every: int, hook: str, step: int, tmp_path: Path
) -> None:
    """In a validation or a test: no validation is missed, whatever it was for, and none counts twice."""
    settings = f"checkpoints: {{every_n_steps: {every}, monitor: val/loss, mode: max}}\n"
    runs = [tmp_path / "runs" / name / "version_0" for name in ("whole", "killed")]
    assert main(["fit", "--config", str(cli_runs.recipe(tmp_path, "whole", f"{settings}trainer: {trainer}"))]) == 0
    kill = f"callbacks: [{{class_path: disk_faults.KilledIn, init_args: {{hook: {hook}, step: {step}}}}}]"
    killed = cli_runs.recipe(tmp_path, "killed", f"{settings}trainer: {trainer[:-1]}, {kill}}}")
    _fit_and_die(killed)
    assert main(["fit", "--config", str(killed), "--ckpt_path", "last", "--trainer.callbacks", "null"]) == 0

    metrics = [json.loads((run / "metrics.json").read_text())["metrics"] for run in runs]
    assert {"val/loss", "test/exact"} <= metrics[0].keys()
    for values in metrics:
        for tag in [tag for tag in values if tag.startswith(("throughput/", "memory/"))]:
            values.pop(tag)
    assert metrics[0] == metrics[1]
    assert _scalars(runs[0], "val/loss") == _scalars(runs[1], "val/loss")
    ends = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in runs]
    for end in ends:
        end["callbacks"]["Throughput"].pop("seconds")
        # Half a step, with which a process may begin, has none.
        end["callbacks"]["RunSummary"]["metrics"].pop("train/gradient_norm", None)
    assert cli_runs.differences(*ends) == []
    # The exported weights are the best ones.
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]


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
