"""What a user gets for a mistake: one line that begins with it, no traceback, exit status 2."""

from __future__ import annotations

import os
import re
import resource
import signal
from pathlib import Path

import cli_runs
import pytest
import torch

from hybridvl.cli import main

MISTAKES = [
    ("model: {net: {pattern: '(swa gnd)'}}", "", r"gnd.*did you mean 'gdn'"),
    ("model: {net: {pattern: '(swa gdn*3'}}", "", r"\n *\(swa gdn\*3\n *\^"),
    ("model: {net: {widht: 3}}", "", r"model\.net\.widht: unknown key, did you mean 'model\.net\.width'\?"),
    ("model: {net: {vision: {depht: 3}}}", "", r"model\.net\.vision\.depht: unknown key, did you mean .*depth'\?"),
    ("trainer: {max_stps: 3}", "", r"trainer\.max_stps: unknown key, did you mean 'trainer\.max_steps'\?"),
    ("optimiser: {lr: 3}", "", r"optimiser\.lr: unknown key, did you mean 'model\.optimizer\.lr'\?"),
    ("", "--model.optimizer.lrr 3", r"model\.optimizer\.lrr: unknown key, did you mean 'model\.optimizer\.lr'\?"),
    ("model: {net: {mixers: {swa: {windw: 4}}}}", "", r"model\.net\.mixers\.swa\.windw: .*'window'"),
    ("data: {task: {init_args: {turms: 3}}}", "", r"init_args\.turms: unknown key, did you mean .*init_args\.turns'"),
    ("", "--data.task.trns 3", r"data\.task\.trns: unknown key, did you mean 'data\.task\.turns'\?"),
    ("", "--run.root /proc/x", r"run\.root: /proc/x: cannot make the run folder there \(No such file"),
    ("", "--run.root /dev/null", r"run\.root: /dev/null: cannot make the run folder there \(Not a directory"),
    ("", f"--run.name {'n' * 300}", r"run\.root: .*cannot make the run folder there \(File name too long"),
    ("", "--model.lora.rank many", r"^error: model\.lora\.rank: Expected int\. Got value: many"),
    ("model: {lora: {targets: gdn}}", "", r"^error: model\.lora\.targets: Expected .*Sequence.* Got value: gdn"),
    ("", "--model.lora.foo 3", r"^error: model\.lora\.foo: unknown key; known here are alpha, dropout, .*, targets$"),
    ("", "--run.stage [layers]", r"^error: run\.stage: \['layers'\]; expected one of supervised, layers, logits$"),
    ("", "--trainer.strategy fsdp3", r"^error: trainer: .*strategy='fsdp3'"),
    ("", "--trainer.max_steps many", r"trainer\.max_steps: Expected int\. Got value: many"),
    ("model: {net: {width: wide}}", "", r"model\.net\.width: Expected .*int.*wide"),
    ("model: {net: {pattern: '${model.net.nothing}'}}", "", r"model\.net\.pattern: .*nothing.* not found"),
    (
        "model: {net: {mixers: {swa: {heads: 3, kv_heads: 2}}}}",
        "",
        r"mixers\.swa.*kv_heads = 2: expected a divisor of heads = 3",
    ),
    (
        "model: {net: {mixers: {swa: {window: 0}}}}",
        "",
        r"net\.mixers.*window = 0: expected an integer of at least 1",
    ),
    ("model: {net: {mixers: {swa: {window: -4}}}}", "", r"model\.net\.mixers.*window = -4: expected an integer"),
    ("model: {net: {vision: {patch_size: 0}}}", "", r"model\.net\.vision\.patch_size: 0; expected a whole number"),
    ("data: {task: {init_args: {growth: -1}}}", "", r"data\.task\.growth: -1; expected a number of epochs"),
    ("run: {threads: 0}", "", r"run\.threads: 0; expected at least 1, or null"),
    ("model: {optimizer: {lr: -1.0}}", "", r"model\.optimizer\.lr: -1\.0 is not a positive number"),
    ("model: {freeze: [vison]}", "", r"model\.freeze: .*'vison'"),
    ("trainer: {max_steps: -1}", "", r"trainer\.max_steps: not set"),
    ("checkpoints: {every_n_steps: 0}", "", r"checkpoints\.every_n_steps: 0"),
    ("checkpoints: {monitor: val/exakt}", "", r"checkpoints\.monitor: .*'val/exakt'.*val/exact"),
    ("data: {max_tokens: 8}", "", r"tokens.*data\.max_tokens.*8|data\.max_tokens.*8.*tokens"),
    ("data: {tokenizer: /no/such/folder}", "", r"tokenizer '/no/such/folder' cannot be loaded"),
    ("model: {net: {image_token_id: 9}}", "", r"model\.net\.image_token_id: 9; the tokenizer's <\|image_pad\|> is 6"),
    ("model: {net: {vocab_size: 100}}", "", r"model\.net\.vocab_size: 100; the tokenizer has \d+ tokens"),
    ("data: {images: {patch_size: 8}}", "", r"data\.images\.patch_size: 8; model\.net\.vision\.patch_size is 4"),
    ("data: {images: {mean: [0.5, 0.5, 0.5], std: [1, 1, 1]}}", "", r"data\.images\.mean: 3 channels; .*channels is 1"),
    ("", "--ckpt_path nowhere.ckpt", r"ckpt_path: nowhere\.ckpt: no such file"),
    ("", "--data.task NoSuch", r"data\.task: NoSuch; expected one of Task, null \(a class by its import path\)$"),
    (
        "",
        "--data.task hybridvl.data.NoSuch",
        r"data\.task: hybridvl\.data\.NoSuch: .* has no attribute 'NoSuch'$",
    ),
    ("", "--seed_everything null", r"seed_everything: null; expected one of bool, int$"),
    ("", "--ckpt_path .", r"ckpt_path: \.: a folder; expected a checkpoint, like last.ckpt"),
    ("", "--ckpt_path last", r"ckpt_path: no .*last\.ckpt; there is nothing to go on from"),
]


@pytest.mark.parametrize(("text", "flags", "message"), MISTAKES)
def test_fit_refuses(text: str, flags: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = cli_runs.recipe(tmp_path, text=text)
    assert main(["fit", "--config", str(recipe), *flags.split()]) == 2
    _assert_refused(capfd, message)
    # A run that got nowhere leaves no folder.
    assert [run for run in tmp_path.glob("runs/*/version_*") if not (run / "checkpoints").exists()] == []


def test_a_missing_recipe(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "nowhere.yaml"]) == 2
    _assert_refused(capfd, r"nowhere\.yaml")


def test_a_recipe_that_is_not_yaml(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_text("model: {net: {pattern: full\n")
    assert main(["fit", "--config", str(tmp_path / "bad.yaml")]) == 2
    _assert_refused(capfd, r"bad\.yaml: .*expected ',' or '}'")


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_these_need_a_checkpoint(command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--config", str(cli_runs.recipe(tmp_path))]) == 2
    _assert_refused(capfd, f"ckpt_path: {command} needs a checkpoint")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = cli_runs.recipe(folder)
    assert main(["fit", "--config", str(recipe), "--trainer.max_steps", "1", "--run.test", "false"]) == 0
    return folder / "runs" / "tiny" / "version_0"


def test_a_checkpoint_of_another_pattern_names_the_layers(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["test", "--config", str(trained / "config.yaml"), "--ckpt_path", "last"]
    assert main([*argv, "--model.net.pattern", "(swa mamba2 full)"]) == 2
    _assert_refused(capfd, r"layer 1 is gdn there, mamba2 here; 2 layers there, 3 here")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.net.pattern", "(swa mamba2)"], r"layer 1 is gdn there, mamba2 here"),
        (["--model.freeze", "[visual]"], r"model\.freeze: .*visual\.\S+ is frozen here"),
    ],
)
def test_a_refused_resume_leaves_the_run_as_it_was(
    flags: list[str], message: str, trained: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = (trained / "config.yaml").read_bytes()
    assert main(["fit", "--config", str(trained / "config.yaml"), "--ckpt_path", "last", *flags]) == 2
    _assert_refused(capfd, message)
    assert (trained / "config.yaml").read_bytes() == before


def test_the_trainers_own_refusal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr("lightning.pytorch.accelerators.CUDAAccelerator.is_available", staticmethod(lambda: False))
    assert main(["fit", "--config", str(cli_runs.recipe(tmp_path)), "--trainer.accelerator", "gpu"]) == 2
    _assert_refused(capfd, r"error: trainer: No supported gpu backend found")


def test_a_pickle_is_not_loaded(trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ran = tmp_path / "ran"
    torch.save({"state_dict": _Bomb(ran)}, tmp_path / "evil.ckpt")
    argv = ["test", "--config", str(trained / "config.yaml"), "--ckpt_path", str(tmp_path / "evil.ckpt")]
    assert main(argv) == 2
    _assert_refused(capfd, r"evil\.ckpt: holds pickled Python objects")
    assert not ran.exists()


def test_a_damaged_checkpoint(trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = (trained / "checkpoints" / "last.ckpt").read_bytes()
    (tmp_path / "half.ckpt").write_bytes(whole[: len(whole) // 2])
    argv = ["test", "--config", str(trained / "config.yaml"), "--ckpt_path", str(tmp_path / "half.ckpt")]
    assert main(argv) == 2
    _assert_refused(capfd, r"half\.ckpt: damaged")


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a folder where not even root may write")
def test_no_permission_to_write_the_run_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", str(cli_runs.recipe(tmp_path)), "--run.root", "/sys/runs"]) == 2
    _assert_refused(capfd, r"error: no permission /sys/runs: (Operation not permitted|Permission denied|Read-only)")


def test_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # A limit on the size of files stands for the full disk: the kernel refuses the write in the same way. Checkpoints
    # grow by nothing here, so the limit is set between the first saving and the second.
    recipe = cli_runs.recipe(tmp_path, text="trainer: {callbacks: [{class_path: disk_faults.FullDisk}]}")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        assert main(["fit", "--config", str(recipe), "--run.test", "false"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    _assert_refused(
        capfd,
        r"cannot save the checkpoint .*last\.ckpt: cannot be written: File too large; the earlier .* is untouched",
    )
    folder = tmp_path / "runs" / "tiny" / "version_0"
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["last.ckpt"]
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4
    assert main(["fit", "--config", str(recipe), "--ckpt_path", "last", "--trainer.callbacks", "null"]) == 0


class _Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def _assert_refused(capfd: pytest.CaptureFixture[str], message: str) -> None:
    printed = capfd.readouterr().err
    # Only the lines of the training that went before may stand above the mistake.
    assert next(line for line in printed.splitlines() if not line.startswith("step ")).startswith("error: ")
    assert "Traceback" not in printed
    assert re.search(message, printed, re.DOTALL), printed
