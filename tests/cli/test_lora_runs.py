"""Fits with adapters: several processes, a kill and a resume, what the run folder holds, and refused checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import cli_runs
import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText

import hybridvl
from hybridvl.cli import main

LORA = {"rank": 3, "alpha": 6.0, "dropout": 0.1, "targets": ["mixers:gdn", "mixers:mamba2"]}
PATTERN = "gdn swa+mamba2"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run whose model is adapted."""
    root = tmp_path_factory.mktemp("lora")
    first = cli_runs.recipe(root, "first", "run: {test: false}\ntrainer: {max_steps: 3, val_check_interval: 3}")
    assert main(["fit", "--config", str(first), "--model.net.pattern", PATTERN]) == 0
    return root


def recipe(root: Path, name: str, text: str = "", **lora: object) -> Path:
    model = {"source": str(root / "runs/first/version_0/model"), "lora": {**LORA, **lora}}
    return cli_runs.stage_recipe(root, "supervised", model, name, f"run: {{test: false}}\n{text}")


def run(root: Path, name: str) -> Path:
    return root / "runs" / name / "version_0"


def last(root: Path, name: str) -> dict:
    return torch.load(run(root, name) / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def whole(root: Path) -> Path:
    """A finished run with adapters."""
    assert main(["fit", "--config", str(recipe(root, "whole")), "--run.test", "true"]) == 0
    return run(root, "whole")


def test_the_run_folder_has_the_model_and_the_adapters(root: Path, whole: Path) -> None:
    state = last(root, "whole")["state_dict"]
    assert state
    assert all(".lora_" in name for name in state)
    metrics = json.loads((whole / "metrics.json").read_text())
    assert metrics["trainable_parameters"] == sum(tensor.numel() for tensor in state.values())
    before, after = (hybridvl.load(run(root, name) / "model") for name in ("first", "whole"))
    assert after.config == before.config
    adapted = {name.partition(".lora_")[0].removeprefix("net.") + ".weight" for name in state}
    old, new = before.state_dict(), after.state_dict()
    assert {name for name in old if not torch.equal(old[name], new[name])} == adapted
    # The test after the fit scores the adapted model; the exported one writes the same answers.
    theirs = AutoModelForImageTextToText.from_pretrained(whole / "model")
    tokens = torch.arange(10, 30)[None]
    with torch.no_grad():
        logits = after(tokens).logits
        torch.testing.assert_close(theirs(tokens).logits, logits, rtol=0, atol=1e-5 * float(logits.abs().max()))
    assert {path.name for path in (whole / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_fit_that_is_resumed_is_uninterrupted(root: Path, whole: Path) -> None:
    """Half a fit, then the rest of it: weights of the adapters, optimizer, generators (dropout) to the last bit."""
    half = recipe(root, "half", "trainer: {max_steps: 8}\nmodel: {optimizer: {total_steps: 12}}")
    content = yaml.safe_load(half.read_text())
    content["model"]["optimizer"]["total_steps"] = 12
    half.write_text(yaml.safe_dump(content))
    assert main(["fit", "--config", str(half)]) == 0
    assert last(root, "half")["global_step"] == 8
    assert main(["fit", "--config", str(half), "--ckpt_path", "last", "--trainer.max_steps", "12"]) == 0
    ends = [last(root, name) for name in ("whole", "half")]
    assert ends[0]["global_step"] == 12
    assert cli_runs.differences(*(end["state_dict"] for end in ends)) == []
    assert cli_runs.differences(*(end["optimizer_states"] for end in ends)) == []
    models = [(run(root, name) / "model" / "model.safetensors").read_bytes() for name in ("whole", "half")]
    assert models[0] == models[1]


def test_a_checkpoint_is_validated_with_its_adapters(root: Path, whole: Path) -> None:
    before = json.loads((whole / "metrics.json").read_text())["metrics"]
    assert main(["validate", "--config", str(whole / "config.yaml"), "--ckpt_path", "last"]) == 0
    after = json.loads((whole / "metrics.json").read_text())["metrics"]
    assert after["val/loss"] == pytest.approx(before["val/loss"], rel=1e-6)


def test_two_processes_train_the_adapters_that_one_does_with_their_batches_together(root: Path) -> None:
    for devices, size in ((1, 4), (2, 2)):
        text = (
            f"trainer: {{devices: {devices}, precision: 64-true, max_steps: 5, val_check_interval: 5, "
            f"gradient_clip_val: 0.05}}\ndata: {{batch_size: {size}, eval_batch_size: {size}}}"
        )
        path = recipe(root, f"processes_{devices}", text, dropout=0.0)
        if devices == 1:
            assert main(["fit", "--config", str(path)]) == 0
        else:
            done = cli_runs.hybridvl("fit", "--config", str(path))
            assert done.returncode == 0, done.stderr
    one, two = (last(root, f"processes_{devices}") for devices in (1, 2))
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, weight in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], weight, rtol=0, atol=1e-9 * float(weight.abs().max()))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.lora.rank", "4"], "model.lora.rank: 4; the checkpoint has adapters with 3"),
        (["--model.lora.alpha", "7"], "model.lora.alpha: 7.0; the checkpoint has adapters with 6.0"),
        (["--model.lora", "null"], "the checkpoint has adapters of rank 3"),
        (["--model.lora.targets", "[lstm]"], "model.lora.targets: no parameter is called 'lstm'"),
        (["--model.lora.ranks", "4"], "ranks"),
    ],
)
def test_a_resume_with_other_adapters_is_refused(
    root: Path, whole: Path, flags: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = recipe(root, "whole")
    assert main(["fit", "--config", str(path), "--ckpt_path", str(whole / "checkpoints" / "last.ckpt"), *flags]) == 2
    assert message in capfd.readouterr().err


def test_a_resume_on_other_weights_is_refused(root: Path, whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hybridvl.save(hybridvl.load(whole / "model"), root / "other")
    argv = ["fit", "--config", str(recipe(root, "whole")), "--model.source", str(root / "other")]
    assert main([*argv, "--ckpt_path", str(whole / "checkpoints" / "last.ckpt")]) == 2
    assert "adapters of other weights than those of model.source" in capfd.readouterr().err
    assert main([*argv, "--ckpt_path", str(run(root, "first") / "checkpoints" / "last.ckpt")]) == 2
    assert "a checkpoint without adapters" in capfd.readouterr().err
