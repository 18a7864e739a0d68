"""Distillation by two processes: the weights of one process with their batches together, for every stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cli_runs
import pytest
import torch

from hybridvl.cli import main

# Five optimizer steps, of two batches each for the layers: accumulation and clipping go through the wrapper too.
TRAINER = {
    "layers": "max_steps: 5, accumulate_grad_batches: 2, gradient_clip_val: 0.05",
    "logits": "max_steps: 5, gradient_clip_val: 0.05",
}
MODEL: dict[str, dict[str, Any]] = {
    "layers": {"loss": "relative_mse", "match": "mixer"},
    "logits": {"divergence": "reverse", "temperature": 2.0, "cross_entropy": 0.3},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher."""
    root = tmp_path_factory.mktemp("stages")
    teacher = cli_runs.recipe(root, "teacher", "run: {test: false}\ntrainer: {max_steps: 3, val_check_interval: 3}")
    assert main(["fit", "--config", str(teacher), "--model.net.pattern", "full*3"]) == 0
    return root


@pytest.mark.parametrize("stage", ["layers", "logits"])
def test_two_processes_distil_what_one_does_with_their_batches_together(root: Path, stage: str) -> None:
    student = {"teacher": str(root / "runs/teacher/version_0/model"), "pattern": "swa gdn mamba2"}
    student["mixers"] = {"swa": {"window": 8}}
    ends, metrics = [], []
    for devices, size in ((1, 4), (2, 2)):
        name = f"{stage}_{devices}"
        text = (
            f"trainer: {{devices: {devices}, precision: 64-true, val_check_interval: 5, {TRAINER[stage]}}}\n"
            f"data: {{batch_size: {size}, eval_batch_size: {size}}}\nrun: {{test: false}}"
        )
        recipe = cli_runs.stage_recipe(root, stage, {"student": student, **MODEL[stage]}, name, text)
        if devices == 1:
            assert main(["fit", "--config", str(recipe)]) == 0
        else:
            done = cli_runs.hybridvl("fit", "--config", str(recipe))
            assert done.returncode == 0, done.stderr
            assert "sync_dist" not in done.stderr
        folder = root / "runs" / name / "version_0"
        ends.append(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True))
        metrics.append(json.loads((folder / "metrics.json").read_text())["metrics"])
    one, two = ends
    assert one["global_step"] == two["global_step"] == 5
    for name, weight in one["state_dict"].items():
        torch.testing.assert_close(
            two["state_dict"][name], weight, rtol=0, atol=1e-9 * float(weight.abs().max()), msg=name
        )
    # The first moments are means of gradients: they may differ where the weights do not yet.
    states = [end["optimizer_states"][0]["state"] for end in ends]
    assert len(states[0]) > 10
    for number, state in states[0].items():
        for moment in ("exp_avg", "exp_avg_sq"):
            largest = float(state[moment].abs().max())
            torch.testing.assert_close(states[1][number][moment], state[moment], rtol=0, atol=1e-9 * largest)
    assert metrics[0].keys() == metrics[1].keys()
    assert {"train/loss", "val/loss"} < metrics[0].keys()
    for key, value in metrics[0].items():
        assert metrics[1][key] == pytest.approx(value, rel=1e-5), key
