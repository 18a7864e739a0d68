"""FSDP2: two processes with shards train what one process trains with their batches together, in every stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cli_runs
import pytest
import sharded_runs
import torch
from safetensors.torch import load_file

import hybridvl
from hybridvl.cli import main
from hybridvl.training.checkpoints.files import read_checkpoint
from hybridvl.training.checkpoints.shards import is_sharded_checkpoint

STUDENT = {"pattern": "swa gdn mamba2", "mixers": {"swa": {"window": 8}}, "activation_checkpointing": True}
LORA = {"rank": 2, "targets": ["mixers"], "projections": ["q_proj", "v_proj", "o_proj"]}

# With AdamW's usual eps, the rounding of a gradient that is nearly zero moves its weight by the learning rate.
PLAIN = {"lr": 0.003, "warmup_steps": 2, "eps": 0.001}

# Every stage with clipping, which all gradients of a step have a part in, and accumulation for one of each kind.
FITS: dict[str, tuple[str, dict[str, Any], str]] = {
    "supervised": ("supervised", {"net": None}, "accumulate_grad_batches: 2, gradient_clip_val: 0.5"),
    "float32": ("supervised", {"net": None, "optimizer": PLAIN}, "precision: 32-true, gradient_clip_val: 0.5"),
    "layers": ("layers", {"match": "mixer"}, "accumulate_grad_batches: 2, gradient_clip_val: 0.05"),
    "logits": ("logits", {"divergence": "reverse", "cross_entropy": 0.3}, "gradient_clip_val: 0.05"),
    "lora": ("supervised", {"lora": LORA}, "gradient_clip_val: 0.05"),
}


def _recipe(root: Path, name: str, devices: int) -> str:
    stage, model, trainer = FITS[name]
    teacher = str(root / "runs/teacher/version_0/model")
    if stage != "supervised":
        model = {**model, "student": {"teacher": teacher, **STUDENT}}
    elif "net" in model:
        other = name == "float32"
        net = {**cli_runs.RECIPE["model"]["net"], "tie_embeddings": not other, "activation_checkpointing": other}
        model = {**model, "net": net}
    else:
        model = {**model, "source": teacher}
    precision = "" if "precision" in trainer else "precision: 64-true, "
    size = 4 // devices
    text = (
        f"trainer: {{devices: {devices}, strategy: {'auto' if devices == 1 else 'fsdp2'}, {precision}"
        f"max_steps: 5, val_check_interval: 5, {trainer}}}\n"
        f"data: {{batch_size: {size}, eval_batch_size: {size}, task: {{init_args: {{val_pages: 7}}}}}}\n"
        f"run: {{test: {str(name == 'supervised').lower()}, version: by_{devices}}}\n"
        # The weights that the fit ends with are not its last ones.
        f"checkpoints: {{monitor: {'val/loss' if name == 'supervised' else 'null'}, mode: max}}\n"
        f"examples: {{count: {2 * (name == 'supervised')}}}"
    )
    return str(cli_runs.stage_recipe(root, stage, model, name, text))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All fits by one process, and then by two."""
    root = tmp_path_factory.mktemp("sharded")
    teacher = cli_runs.recipe(root, "teacher", "run: {test: false}\ntrainer: {max_steps: 3, val_check_interval: 3}")
    assert main(["fit", "--config", str(teacher), "--model.net.pattern", "full*3"]) == 0
    for name in FITS:
        assert main(["fit", "--config", _recipe(root, name, 1)]) == 0
    fits = [["fit", "--config", _copy(_recipe(root, name, 2))] for name in FITS]
    # The same fit again, ended after three steps by one process and by two, and gone on with by two.
    first, then = ["--trainer.max_steps", "3"], ["--ckpt_path", str(root / "runs/supervised/{}/checkpoints/last.ckpt")]
    assert main(_again(root, 1, "3_by_1", first)) == 0
    fits += [_again(root, 2, "3_by_2", first)]
    fits += [_again(root, 2, f"{half}_then_2", [word.format(half) for word in then]) for half in ("3_by_2", "3_by_1")]
    fits += [_again(root, 2, "bf16", ["--trainer.precision", "bf16-mixed"])]
    fits += [_of_another_teacher(root)]  # the last one: it is refused
    both = sharded_runs.two_processes(fits)
    assert [done.returncode for done in both] == [2, 2], "\n".join(done.stderr for done in both)
    for rank, done in enumerate(both):
        assert "sync_dist" not in done.stderr
        (root / f"refused_{rank}.txt").write_text(done.stderr)
    return root


def _again(root: Path, devices: int, version: str, flags: list[str]) -> list[str]:
    recipe = _copy(_recipe(root, "supervised", devices))
    run = ["--run.version", version, "--run.test", "false", "--model.optimizer.total_steps", "5"]
    return ["fit", "--config", recipe, *run, *flags]


def _of_another_teacher(root: Path) -> list[str]:
    """A fit that goes on, with another teacher, from a checkpoint of this one's student."""
    other = hybridvl.load(root / "runs/teacher/version_0/model")
    with torch.no_grad():
        other.decoder.layers[2].mlp.down_proj.weight[-1, -1] += 1  # in the second process's share
    hybridvl.save(other, root / "other")
    last = str(root / "runs/logits/by_2/checkpoints/last.ckpt")
    flags = ["--model.student.teacher", str(root / "other"), "--run.version", "other", "--ckpt_path", last]
    return ["fit", "--config", _copy(_recipe(root, "logits", 2)), *flags]


def _copy(recipe: str) -> str:
    """The recipe under another name, which the next one of that name does not replace."""
    path = Path(recipe)
    return str(path.rename(path.with_name(f"{path.stem}_{len(list(path.parent.iterdir()))}.yaml")))


def _both(root: Path, name: str) -> tuple[Path, Path]:
    return root / "runs" / name / "by_1", root / "runs" / name / "by_2"


@pytest.mark.parametrize("name", FITS)
def test_two_processes_train_what_one_trains_with_their_batches_together(root: Path, name: str) -> None:
    one, two = _both(root, name)
    relative = 1e-5 if name == "float32" else 1e-9
    assert is_sharded_checkpoint(two / "checkpoints/last.ckpt")
    ends = [read_checkpoint(path / "checkpoints/last.ckpt") for path in (one, two)]
    assert ends[0]["global_step"] == ends[1]["global_step"] == 5
    # The weights, and the model that was put together of them; the first moments are means of gradients, which may
    # differ where weights do not yet.
    weights = [end["state_dict"] for end in ends], [load_file(path / "model/model.safetensors") for path in (one, two)]
    for alone, together in weights:
        assert alone.keys() == together.keys()
        for key, weight in alone.items():
            assert together[key].dtype == weight.dtype == (torch.float32 if name == "float32" else torch.float64)
            torch.testing.assert_close(
                together[key], weight, rtol=0, atol=relative * float(weight.abs().max()), msg=f"{key}"
            )
    states = [end["optimizer_states"][0] for end in ends]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    assert len(states[0]["state"]) > 10
    for number, state in states[0]["state"].items():
        for moment in ("exp_avg", "exp_avg_sq"):
            largest = float(state[moment].abs().max())
            torch.testing.assert_close(
                states[1]["state"][number][moment], state[moment], rtol=0, atol=20 * relative * largest
            )


@pytest.mark.parametrize("name", FITS)
def test_metrics_are_those_of_all_processes(root: Path, name: str) -> None:
    one, two = (json.loads((path / "metrics.json").read_text()) for path in _both(root, name))
    assert one["metrics"].keys() == two["metrics"].keys()
    for key, value in one["metrics"].items():
        assert two["metrics"][key] == pytest.approx(value, rel=1e-5), key
    facts = ("tokens", "samples", "steps", "parameters", "trainable_parameters")
    assert [one[fact] for fact in facts] == [two[fact] for fact in facts]


def test_a_resume_is_the_uninterrupted_fit_to_the_last_bit(root: Path) -> None:
    runs = root / "runs/supervised"
    ends = [read_checkpoint(runs / run / "checkpoints/last.ckpt") for run in ("by_2", "3_by_2_then_2")]
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "ChatDataModule"):
        assert cli_runs.differences(ends[0][part], ends[1][part]) == [], part


def test_shards_go_on_where_a_fit_without_them_ended(root: Path) -> None:
    runs = root / "runs/supervised"
    ends = [read_checkpoint(runs / run / "checkpoints/last.ckpt") for run in ("by_1", "3_by_1_then_2")]
    assert [end["global_step"] for end in ends] == [5, 5]
    for key, weight in ends[0]["state_dict"].items():
        torch.testing.assert_close(
            ends[1]["state_dict"][key], weight, rtol=0, atol=1e-9 * float(weight.abs().max()), msg=key
        )


def test_the_best_weights_end_up_in_the_model(root: Path) -> None:
    for path in _both(root, "supervised"):
        best, last = (read_checkpoint(path / "checkpoints" / f"{name}.ckpt")["state_dict"] for name in ("best", "last"))
        model = load_file(path / "model/model.safetensors")
        assert all(torch.equal(model[key.removeprefix("net.")], weight) for key, weight in best.items())
        assert not all(torch.equal(last[key], weight) for key, weight in best.items())


@pytest.mark.parametrize("name", ["logits", "lora"])
def test_a_folder_of_shards_becomes_a_model_folder(root: Path, name: str, tmp_path: Path) -> None:
    run = root / "runs" / name / "by_2"
    assert main(["export", str(run / "checkpoints/last.ckpt"), "--out", str(tmp_path / "model")]) == 0
    for file in (run / "model").iterdir():
        assert (tmp_path / "model" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_checkpoint_of_another_teachers_student_is_refused(root: Path) -> None:
    for rank in range(2):
        told = (root / f"refused_{rank}.txt").read_text()
        (error,) = (line for line in told.splitlines() if line.startswith("error: "))
        assert "a checkpoint of another teacher's student: decoder.layers.2.mlp.down_proj.weight are not" in error
        assert "Traceback" not in told
    assert not (root / "runs/logits/other").exists()


def test_bf16_mixed_keeps_float32_weights_and_does_much_the_same(root: Path) -> None:
    runs = root / "runs/supervised"
    end = read_checkpoint(runs / "bf16/checkpoints/last.ckpt")
    (state,) = end["optimizer_states"]
    kept = [*end["state_dict"].values(), *(tensor for entry in state["state"].values() for tensor in entry.values())]
    assert {tensor.dtype for tensor in kept} == {torch.float32}
    precise, rough = (json.loads((runs / run / "metrics.json").read_text())["metrics"] for run in ("by_1", "bf16"))
    assert rough["val/loss"] == pytest.approx(precise["val/loss"], rel=2e-3)
    assert rough["val/loss"] != pytest.approx(precise["val/loss"], rel=1e-7)
