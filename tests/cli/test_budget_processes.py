"""Two processes with packed batches of images by a token budget: resumed to the last bit, skipped samples counted."""

from __future__ import annotations

import json
from pathlib import Path

import cli_runs
import torch

SETTINGS = """
trainer: {devices: 2, max_steps: 6, val_check_interval: 6, callbacks: [{class_path: disk_faults.Kept}]}
data:
  packing: true
  max_tokens: 54
  tokens_per_batch: 160
  too_long: skip
  workers: 1
  task: {init_args: {columns: [1, 4]}}
  images: {min_pixels: 64}
run: {test: false}
"""


def test_packed_and_resumed_by_two_processes_is_uninterrupted(tmp_path: Path) -> None:
    recipe = str(cli_runs.recipe(tmp_path, "packed", SETTINGS))
    folders = [tmp_path / "runs" / name / "version_0" for name in ("packed", "resumed")]
    whole = cli_runs.hybridvl("fit", "--config", recipe)
    assert whole.returncode == 0, whole.stderr
    more = ("--ckpt_path", str(folders[0] / "checkpoints" / "kept.ckpt"), "--trainer.callbacks", "null")
    done = cli_runs.hybridvl("fit", "--config", recipe, "--run.name", "resumed", *more)
    assert done.returncode == 0, done.stderr
    ends = [torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in folders]
    assert ends[0]["global_step"] == ends[1]["global_step"] == 6
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "ChatDataModule"):
        assert cli_runs.differences(ends[0][part], ends[1][part]) == [], part
    states = ends[0]["ChatDataModule"]["train"]["processes"]
    assert len(states) == 2
    assert [state["order"]["samples"] for state in states] == [21, 25]
    assert [state["skipped"] for state in states] == [3, 6]
    for folder in folders:
        facts = json.loads((folder / "metrics.json").read_text())
        assert facts["skipped"]["train"] == 9
        assert facts["samples"] == 21 + 25 - 9
    assert "skipped      9 train samples, too long" in whole.stdout
