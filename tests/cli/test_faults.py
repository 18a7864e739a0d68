"""Losses that are no number and a lack of memory: one message, exit status 3, checkpoints as they were."""

from __future__ import annotations

import subprocess
from pathlib import Path

import cli_runs
import pytest
import torch

from hybridvl.cli import main

STEPS = "max_steps: 9, callbacks: [{class_path: disk_faults.%s}]"
LARGE = "data: {batch_size: 256, eval_batch_size: 4}\nrun: {test: false}\ncheckpoints: {every_n_steps: 1}\n"


def _error(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    return errors[0]


def _last_step(folder: Path) -> int:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


@pytest.mark.parametrize("stage", ["supervised", "layers", "logits"])
def test_a_loss_that_is_no_number_stops_every_stage(
    stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"trainer: {{{STEPS % 'Poisoned'}}}\nrun: {{test: false}}\ncheckpoints: {{every_n_steps: 2}}"
    path = cli_runs.recipe(tmp_path, "supervised", text)
    if stage != "supervised":
        teacher = cli_runs.recipe(tmp_path, "teacher", "run: {test: false}\ntrainer: {max_steps: 1}")
        assert main(["fit", "--config", str(teacher), "--model.net.pattern", "full*2"]) == 0
        student = {"teacher": str(tmp_path / "runs/teacher/version_0/model"), "pattern": "swa gdn"}
        path = cli_runs.stage_recipe(tmp_path, stage, {"student": student}, text=text)
    capsys.readouterr()
    assert main(["fit", "--config", str(path)]) == 3
    folder = tmp_path / "runs" / stage / "version_0"
    saved = folder / "not_finite" / "step_6_process_0.pt"
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"error: step 6: the loss is nan; the step was not taken; the batch is in {saved}; ")
    assert f"{folder / 'checkpoints' / 'last.ckpt'} is as it was" in message
    assert _last_step(folder) == 4
    batch = torch.load(saved, weights_only=True)["batch"]
    assert batch["pixel_values"][0].isnan().all()
    assert not (folder / "model").exists()


def test_one_of_two_processes_stops_both(tmp_path: Path) -> None:
    text = f"trainer: {{devices: 2, {STEPS % 'Poisoned'}}}\ndata: {{batch_size: 2}}"
    done = cli_runs.hybridvl("fit", "--config", str(cli_runs.recipe(tmp_path, "two", text)))
    folder = tmp_path / "runs" / "two" / "version_0"
    assert "step 6: the loss is nan" in _error(done)
    assert [file.name for file in (folder / "not_finite").iterdir()] == ["step_6_process_1.pt"]
    assert _last_step(folder) == 4


def test_a_lack_of_memory_names_what_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**16))
    text = f"{LARGE}trainer: {{devices: 2, val_check_interval: 9, {STEPS % 'LittleMemory'}}}"
    message = _error(cli_runs.hybridvl("fit", "--config", str(cli_runs.recipe(tmp_path, "large", text))))
    assert "error: out of memory of the computer (" in message
    for help in (
        "a smaller data.batch_size (now 256; a larger trainer.accumulate_grad_batches, now 1, keeps",
        "a smaller data.max_tokens (now 256)",
        "model.net.activation_checkpointing: true",
        "a smaller model.loss_chunk (now 1024)",
        "a smaller data.eval_batch_size (now 4)",
    ):
        assert help in message
    # The last process runs out of memory before or after the first one saves its second checkpoint.
    assert _last_step(tmp_path / "runs" / "large" / "version_0") == 2
