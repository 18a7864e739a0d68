"""Two processes: packed batches by a token budget resumed to the last bit, skipped samples counted, and a teacher's
logits kept by one process and used by two."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cli_runs
import pytest
import sharded_runs
import torch

from hybridvl.cli import main

PACKED = """
trainer: {devices: 2, max_steps: 6, val_check_interval: 6, callbacks: [{class_path: disk_faults.Kept}]}
data:
  packing: true
  max_tokens: 54
  tokens_per_batch: 160
  too_long: skip
  workers: 1
  task: {init_args: {columns: [1, 4]}}
  images: {min_pixels: 64}
run: {test: false, version: whole}
"""
LOGITS = """
trainer: {{devices: {devices}, strategy: {strategy}, precision: 64-true, max_steps: 4, val_check_interval: 4}}
data: {{batch_size: {size}, eval_batch_size: {size}, train_samples: 8}}
run: {{test: false, version: {version}}}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All fits of two processes."""
    root = tmp_path_factory.mktemp("processes")
    packed = ["fit", "--config", str(cli_runs.recipe(root, "packed", PACKED))]
    kept = str(root / "runs" / "packed" / "whole" / "checkpoints" / "kept.ckpt")
    more = ["--ckpt_path", kept, "--trainer.callbacks", "null", "--run.version", "resumed"]
    teacher = cli_runs.recipe(root, "teacher", "run: {test: false}\ntrainer: {max_steps: 3, val_check_interval: 3}")
    assert main(["fit", "--config", str(teacher), "--model.net.pattern", "full*2"]) == 0
    assert main(["fit", "--config", _logits(root, "one", "kept", 1)]) == 0
    shutil.copytree(root / "kept", root / "kept_by_one")
    fits = [
        _logits(root, "two", "kept", 2),
        *(_logits(root, n, "kept_in_shards", 2, "fsdp2") for n in ("cold", "warm")),
    ]
    both = [packed, packed + more, *(["fit", "--config", fit] for fit in fits)]
    ended = sharded_runs.two_processes(both)
    assert [done.returncode for done in ended] == [0, 0], [done.stderr for done in ended]
    (root / "stdout.txt").write_text(ended[0].stdout)
    return root


def _logits(root: Path, version: str, kept: str, devices: int, strategy: str = "auto") -> str:
    student = {"teacher": str(root / "runs/teacher/version_0/model"), "pattern": "swa gdn"}
    model = {"student": student, "teacher_logits": {"folder": str(root / kept), "top_k": 20}}
    text = LOGITS.format(devices=devices, size=4 // devices, version=version, strategy=strategy)
    path = cli_runs.stage_recipe(root, "logits", model, text=text)
    return str(path.rename(root / f"{version}.yaml"))


def _left(root: Path, name: str, version: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last checkpoint and the facts of a run."""
    folder = root / "runs" / name / version
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True), json.loads(
        (folder / "metrics.json").read_text()
    )


def test_packed_and_resumed_by_two_processes_is_uninterrupted(root: Path) -> None:
    (whole, facts), (resumed, other_facts) = (_left(root, "packed", version) for version in ("whole", "resumed"))
    assert whole["global_step"] == resumed["global_step"] == 6
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "ChatDataModule"):
        assert cli_runs.differences(whole[part], resumed[part]) == [], part
    states = whole["ChatDataModule"]["train"]["processes"]
    assert [state["order"]["samples"] for state in states] == [21, 25]
    assert [state["skipped"] for state in states] == [3, 6]
    for found in (facts, other_facts):
        assert found["skipped"]["train"] == 9
        assert found["samples"] == 21 + 25 - 9
    assert (root / "stdout.txt").read_text().count("skipped      9 train samples, too long") == 2


def test_two_processes_use_what_one_has_kept(root: Path) -> None:
    (one, facts), (two, other_facts) = (_left(root, "logits", version) for version in ("one", "two"))
    for name, weight in one["state_dict"].items():
        near = 1e-9 * float(weight.abs().max())
        torch.testing.assert_close(two["state_dict"][name], weight, rtol=0, atol=near, msg=name)
    metrics, others = facts["metrics"], other_facts["metrics"]
    assert (metrics["train/cached"], others["train/cached"]) == (1, 1)  # the second epoch, and all of it
    assert others["val/divergence"] == pytest.approx(metrics["val/divergence"], rel=1e-9)
    files = [sorted(path.name for path in (root / name).iterdir()) for name in ("kept", "kept_by_one")]
    assert files[0] == files[1]


def test_shards_use_what_shards_have_kept(root: Path) -> None:
    metrics = [
        json.loads((root / "runs/logits" / name / "metrics.json").read_text())["metrics"]
        for name in ("one", "cold", "warm")
    ]
    for found in metrics[1:]:
        assert found["val/divergence"] == pytest.approx(metrics[0]["val/divergence"], rel=1e-6)
    assert metrics[2]["train/cached"] == 1


def test_a_killed_fit_that_keeps_logits_goes_on_to_the_last_bit(root: Path) -> None:
    flags = ["--trainer.precision", "32-true", "--checkpoints.every_n_steps", "1", "--model.optimizer.total_steps", "5"]
    for folder, parts in (("whole", ["5"]), ("cut", ["3", "5"])):
        recipe = _logits(root, folder, f"kept_{folder}", 1)
        for steps in parts:
            more = ["--ckpt_path", "last"] if steps != parts[0] else []
            assert main(["fit", "--config", recipe, *flags, "--trainer.max_steps", steps, *more]) == 0
            if len(parts) > 1 and not more:  # what a killed process has not written is made again
                sorted((root / "kept_cut").glob("*.parquet"))[-1].unlink()
    whole, cut = (_left(root, "logits", version)[0] for version in ("whole", "cut"))
    for part in ("state_dict", "optimizer_states"):
        assert cli_runs.differences(whole[part], cut[part]) == [], part


def test_what_is_kept_of_something_else_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(root / "one.yaml")
    assert main(["fit", "--config", recipe, "--run.version", "no", "--model.temperature", "1.0"]) == 2
    message = f"error: model.teacher_logits.folder: {root / 'kept'} was made with temperature = 2.0; here it is 1.0"
    assert message in capsys.readouterr().err
    assert main(["fit", "--config", recipe, "--run.version", "no", "--model.teacher_logits.topk", "9"]) == 2
    assert "model.teacher_logits.topk: unknown key" in capsys.readouterr().err
