"""Two processes train what one trains with their batches together, resume exactly, and fail with one message."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import cli_runs
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

TWO = "trainer: {devices: 2, precision: 64-true, max_steps: 6, val_check_interval: 3}\ndata: {batch_size: 2}"
ONE = "trainer: {devices: 1, precision: 64-true, max_steps: 6, val_check_interval: 3}\ndata: {batch_size: 4}"


def _checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same six steps by one process and by two, each with a test of seven questions."""
    root = tmp_path_factory.mktemp("processes")
    for name, settings in (("one", ONE), ("two", TWO)):
        task = "task: {init_args: {test_pages: 7, val_pages: 7}}"
        recipe = cli_runs.recipe(root, name, settings.replace("data: {", f"data: {{{task}, "))
        done = cli_runs.hybridvl("fit", "--config", str(recipe))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("model        ") == 2  # the pattern at the start, the folder at the end
        assert "sync_dist" not in done.stderr
    return root / "runs"


def test_two_processes_train_what_one_trains_with_their_batches_together(runs: Path) -> None:
    one, two = (_checkpoint(runs / name / "version_0")["state_dict"] for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-9 * float(weight.abs().max()), msg=name)
    assert not list(runs.glob("two/version_1"))


def test_counts_and_scores_are_those_of_all_processes(runs: Path) -> None:
    one, two = (json.loads((runs / name / "version_0" / "metrics.json").read_text()) for name in ("one", "two"))
    assert one["metrics"].keys() == two["metrics"].keys()
    assert {name for name in one["metrics"] if name.startswith("test/")} >= {"test/exact", "test/digit_accuracy"}
    for name, value in one["metrics"].items():
        assert two["metrics"][name] == pytest.approx(value, rel=1e-5), name
    assert (one["tokens"], one["samples"], one["steps"]) == (two["tokens"], two["samples"], two["steps"])


def test_killed_and_resumed_by_two_processes_is_uninterrupted(runs: Path, tmp_path: Path) -> None:
    task = "task: {init_args: {test_pages: 7, val_pages: 7}}"
    settings = TWO.replace("data: {", f"data: {{{task}, workers: 1, ") + "\nrun: {test: false}"
    killed = cli_runs.recipe(
        tmp_path, "killed", settings.replace("max_steps", "callbacks: [{class_path: disk_faults.Killed}], max_steps")
    )
    # Returns when the last process that holds the output has ended: neither the second process nor a worker is left.
    assert cli_runs.hybridvl("fit", "--config", str(killed)).returncode == -signal.SIGKILL
    folder = tmp_path / "runs" / "killed" / "version_0"
    assert _checkpoint(folder)["global_step"] == 4
    done = cli_runs.hybridvl("fit", "--config", str(killed), "--ckpt_path", "last", "--trainer.callbacks", "null")
    assert done.returncode == 0, done.stderr
    ends = [_checkpoint(path) for path in (runs / "two" / "version_0", folder)]
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "ChatDataModule"):
        assert cli_runs.differences(ends[0][part], ends[1][part]) == [], part
    assert len(ends[0]["callbacks"]["ExactResume"]["processes"]) == 2


def test_sigterm_to_the_first_process_ends_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDVL_TEST_FAULT", "stage SIGTERM")
    told = cli_runs.recipe(
        tmp_path, "told", TWO.replace("max_steps", "callbacks: [{class_path: disk_faults.Ended}], max_steps")
    )
    # As above, it returns when both have ended.
    done = cli_runs.hybridvl("fit", "--config", str(told))
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "Traceback" not in done.stderr
    assert _checkpoint(tmp_path / "runs" / "told" / "version_0")["global_step"] == 4


def test_a_process_whose_first_one_is_gone_ends_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("HYBRIDVL_FIRST_PROCESS", "1")  # not the number of this process
    done = cli_runs.hybridvl("fit", "--config", str(cli_runs.recipe(tmp_path, "late", TWO)))
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    assert not (tmp_path / "runs").exists()


def test_what_all_processes_refuse_is_said_once(runs: Path, tmp_path: Path) -> None:
    other = cli_runs.recipe(tmp_path, "other", TWO)
    last = str(runs / "two" / "version_0" / "checkpoints" / "last.ckpt")
    done = cli_runs.hybridvl("fit", "--config", str(other), "--model.net.pattern", "(swa mamba2)", "--ckpt_path", last)
    _assert_said_once(done, "layer")


def test_what_only_the_second_process_meets_is_said_too(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    for name in ("good.png", "cut.png"):
        Image.fromarray(noise).save(tmp_path / name)
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:150])
    turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "Noise."}]
    rows = [{"messages": turns, "images": [name]} for name in ("good.png", "cut.png", *["good.png"] * 10)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = f"task: {{class_path: hybridvl.data.messages.MessageData, init_args: {{path: {tmp_path / 'chat.jsonl'}}}}}"
    recipe = cli_runs.recipe(tmp_path, "damaged", TWO)
    text = yaml.safe_load(recipe.read_text())
    text["data"]["task"] = yaml.safe_load(task)["task"]
    text["data"]["task"]["init_args"]["val_samples"] = 4
    recipe.write_text(yaml.safe_dump(text))
    _assert_said_once(cli_runs.hybridvl("fit", "--config", str(recipe)), "cut.png cannot be read")


def _assert_said_once(done: subprocess.CompletedProcess[str], what: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert what in errors[0]
