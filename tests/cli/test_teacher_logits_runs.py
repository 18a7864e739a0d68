"""`model.teacher_logits` in a recipe: kept by one process, used by two, refused when the temperature changes."""

from __future__ import annotations

import json
from pathlib import Path

import cli_runs
import pytest
import torch

from hybridvl.cli import main

TEXT = """
trainer: {{devices: {devices}, precision: 64-true, max_steps: 4, val_check_interval: 4}}
data: {{batch_size: {size}, eval_batch_size: {size}, train_samples: 8}}
run: {{test: false}}
"""


def test_two_processes_use_what_one_has_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = cli_runs.recipe(tmp_path, "teacher", "run: {test: false}\ntrainer: {max_steps: 3, val_check_interval: 3}")
    assert main(["fit", "--config", str(teacher), "--model.net.pattern", "full*2"]) == 0
    student = {"teacher": str(tmp_path / "runs/teacher/version_0/model"), "pattern": "swa gdn"}
    model = {"student": student, "teacher_logits": {"folder": str(tmp_path / "kept"), "top_k": 20}}
    recipes = [
        str(cli_runs.stage_recipe(tmp_path, "logits", model, name, TEXT.format(devices=devices, size=size)))
        for name, devices, size in (("one", 1, 4), ("two", 2, 2))
    ]
    assert main(["fit", "--config", recipes[0]]) == 0
    assert sorted(path.suffix for path in (tmp_path / "kept").iterdir()) == [".json", ".parquet"]
    done = cli_runs.hybridvl("fit", "--config", recipes[1])
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "kept").glob("*.parquet"))) == 1
    folders = [tmp_path / "runs" / name / "version_0" for name in ("one", "two")]
    one, two = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for f in folders)
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-9 * float(weight.abs().max()), msg=name)
    metrics = [json.loads((folder / "metrics.json").read_text())["metrics"] for folder in folders]
    assert metrics[1]["train/cached"] == 1
    assert metrics[1]["val/divergence"] == pytest.approx(metrics[0]["val/divergence"], rel=1e-9)
    capsys.readouterr()
    assert main(["fit", "--config", recipes[0], "--model.temperature", "1.0"]) == 2
    message = f"error: model.teacher_logits.folder: {tmp_path / 'kept'} was made with temperature = 2.0; here it is 1.0"
    assert message in capsys.readouterr().err
    assert main(["fit", "--config", recipes[0], "--model.teacher_logits.topk", "9"]) == 2
    assert "model.teacher_logits.topk: unknown key" in capsys.readouterr().err
