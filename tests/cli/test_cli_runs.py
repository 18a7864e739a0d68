"""The commands on a run that takes seconds: what they print, and what they leave in the run folder."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import cli_runs
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from hybridvl.cli import main
from hybridvl.data.digits import DigitPages


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("commands")
    assert main(["fit", "--config", str(cli_runs.recipe(folder)), "--checkpoints.monitor", "val/exact"]) == 0
    return folder / "runs" / "tiny" / "version_0"


def test_fit_leaves_a_whole_run_folder(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "metrics.json", "checkpoints", "model"} < names
    assert any(name.startswith("events.") for name in names)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["steps"] == 12
    assert {"train/loss", "val/exact", "test/exact"} < set(metrics["metrics"])
    assert datetime.fromisoformat(metrics["ended"]) <= datetime.now(UTC)


def test_progress_is_in_a_file(run: Path) -> None:
    """Its last lines are of the test; a test of its own later writes none."""
    path = run / "progress.json"
    progress = json.loads(path.read_text())
    metrics = json.loads((run / "metrics.json").read_text())
    assert (progress["doing"], progress["step"], progress["steps"]) == ("test", 12, 12)
    assert (progress["tokens"], progress["seconds"]) == (metrics["tokens"], metrics["seconds"])
    assert progress["metrics"]["val/exact"] == metrics["metrics"]["val/exact"]


def test_labels_and_metrics_are_all_that_hparams_shows(tmp_path: Path) -> None:
    argv = ["fit", "--config", str(cli_runs.recipe(tmp_path)), "--trainer.max_steps", "1", "--run.test", "false"]
    argv += ["--run.metrics", '["test/lag_1_exact", "val/loss"]']
    assert main([*argv, "--run.labels", '{"ratio": "1/4", "window": "16"}', "--seed_everything", "3"]) == 0
    folder = tmp_path / "runs" / "tiny" / "version_0"
    assert yaml.safe_load((folder / "config.yaml").read_text())["run"]["labels"] == {"ratio": "1/4", "window": "16"}
    events = EventAccumulator(str(min(folder.glob("events.*"))))
    events.Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    shown = HParamsPluginData.FromString(content).session_start_info.hparams
    assert {name: value.string_value or value.number_value for name, value in shown.items()} == {
        "ratio": "1/4",
        "window": "16",
        "seed": "3",
    }
    content = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    columns = [info.name.tag for info in HParamsPluginData.FromString(content).experiment.metric_infos]
    assert columns == ["test/lag_1_exact", "val/loss"]


def test_the_saved_recipe_is_resolved_and_repeats_the_run(run: Path, tmp_path: Path) -> None:
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["data"]["images"]["patch_size"] == 4
    assert saved["model"]["optimizer"]["betas"] == [0.9, 0.95]
    assert (saved["ckpt_path"], saved["run"]["version"]) == (None, None)
    assert main(["fit", "--config", str(run / "config.yaml"), "--run.root", str(tmp_path)]) == 0
    again = tmp_path / "tiny" / "version_0"
    one, other = (torch.load(path / "checkpoints" / "last.ckpt", weights_only=True) for path in (run, again))
    assert all(torch.equal(one["state_dict"][name], other["state_dict"][name]) for name in one["state_dict"])


def test_fit_says_where_everything_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = cli_runs.recipe(tmp_path)
    assert main(["fit", "--config", str(recipe), "--trainer.max_steps", "1"]) == 0
    folder = tmp_path / "runs" / "tiny" / "version_0"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("model        swa gdn, ")
    assert f"run folder   {folder}" in lines
    assert f"checkpoint   {folder / 'checkpoints' / 'last.ckpt'}" in lines
    assert f"watch        tensorboard --logdir {folder.parent}" in lines
    assert any(line.startswith("score        test/exact ") for line in lines)


@pytest.mark.parametrize("pattern", ["full*4", "swa*4", "mamba2*4", "(swa gdn*3)", "(swa+mamba2)*4"])
def test_only_the_pattern_changes(pattern: str, tmp_path: Path) -> None:
    argv = ["fit", "--config", str(cli_runs.recipe(tmp_path)), "--model.net.pattern", pattern]
    assert main([*argv, "--trainer.max_steps", "3", "--run.test", "false"]) == 0
    written = json.loads((tmp_path / "runs" / "tiny" / "version_0" / "metrics.json").read_text())
    assert written["steps"] == 3


def test_a_mixers_option_from_the_command_line(tmp_path: Path) -> None:
    # Left to itself, jsonargparse drops the other options of the mixer.
    argv = ["fit", "--config", str(cli_runs.recipe(tmp_path)), "--model.net.mixers.swa.window", "8"]
    argv += ["--model.net.mixers.gdn.gate=false", "--model.net.mixers.swa.qk_norm", "true"]
    assert main([*argv, "--trainer.max_steps", "1", "--run.test", "false"]) == 0
    saved = yaml.safe_load((tmp_path / "runs" / "tiny" / "version_0" / "config.yaml").read_text())
    mixers = saved["model"]["net"]["mixers"]
    assert mixers["swa"] == {"heads": 2, "kv_heads": 1, "head_dim": 16, "window": 8, "qk_norm": True}
    assert mixers["gdn"] == {"heads": 2, "head_dim": 8, "gate": False}
    assert set(mixers) == {"full", "swa", "gdn", "mamba2"}


def test_a_flag_overrides_what_is_interpolated(tmp_path: Path) -> None:
    # cell 16 makes the sides of all pages multiples of the larger patches.
    argv = ["fit", "--config", str(cli_runs.recipe(tmp_path, text="data: {task: {init_args: {cell: 16}}}"))]
    argv += ["--model.net.vision.patch_size", "8", "--trainer.max_steps", "1", "--run.test", "false"]
    assert main(argv) == 0
    saved = yaml.safe_load((tmp_path / "runs" / "tiny" / "version_0" / "config.yaml").read_text())
    assert saved["data"]["images"]["patch_size"] == saved["model"]["net"]["vision"]["patch_size"] == 8


def test_bfloat16_and_clipping_from_the_command_line(tmp_path: Path) -> None:
    argv = ["fit", "--config", str(cli_runs.recipe(tmp_path)), "--trainer.precision", "bf16-mixed"]
    assert main([*argv, "--trainer.gradient_clip_val", "0.5", "--trainer.max_steps", "3"]) == 0


def test_test_and_validate_repeat_the_scores_of_the_fit(run: Path) -> None:
    before = json.loads((run / "metrics.json").read_text())
    for command in ("test", "validate"):
        argv = [command, "--config", str(run / "config.yaml"), "--ckpt_path", "best"]
        assert main(argv) == 0
    after = json.loads((run / "metrics.json").read_text())
    scores = {tag: value for tag, value in before["metrics"].items() if tag.startswith("test/")}
    assert "test/exact" in scores
    assert "val/exact" in after["later"]
    assert {tag: after["later"][tag] for tag in scores} == pytest.approx(scores)
    assert {name: value for name, value in after.items() if name != "later"} == {
        name: value for name, value in before.items() if name != "later"
    }
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]


def test_a_later_command_leaves_what_the_fit_has_found(run: Path) -> None:
    path = run / "metrics.json"
    written = json.loads(path.read_text())
    marked = {**written, "later": {"val/loss": -1.0, "test/exact": -1.0}}
    path.write_text(json.dumps(marked))
    argv = ["test", "--config", str(run / "config.yaml"), "--ckpt_path", "last"]
    assert main([*argv, "--data.task.init_args.test_pages", "3"]) == 0  # of another test set
    after = json.loads(path.read_text())
    assert after["metrics"] == written["metrics"]
    assert after["later"]["val/loss"] == -1.0
    assert after["later"]["test/exact"] >= 0
    path.write_text(json.dumps(written))


def test_a_fit_that_is_gone_on_with_forgets_tests_of_its_unfinished_weights(tmp_path: Path) -> None:
    recipe = str(cli_runs.recipe(tmp_path, text="run: {test: false}"))
    path = tmp_path / "runs" / "tiny" / "version_0" / "metrics.json"
    assert main(["fit", "--config", recipe, "--trainer.max_steps", "6"]) == 0
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "metrics": {**facts["metrics"], "test/exact": 0.25}}))
    assert main(["fit", "--config", recipe, "--ckpt_path", "last"]) == 0
    after = json.loads(path.read_text())
    assert "test/exact" not in after["metrics"]
    assert after["steps"] == 12
    assert "ended" in after


def test_a_later_command_logs_at_the_step_of_its_checkpoint(run: Path) -> None:
    earlier = set(run.glob("events.*"))
    for command in ("validate", "test"):
        assert main([command, "--config", str(run / "config.yaml"), "--ckpt_path", "last"]) == 0
    steps: dict[str, set[int]] = {}
    for file in set(run.glob("events.*")) - earlier:
        events = EventAccumulator(str(file))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            steps.setdefault(tag, set()).update(event.step for event in events.Scalars(tag))
        for tag in events.Tags()["images"]:
            steps.setdefault(tag, set()).update(event.step for event in events.Images(tag))
    assert {"val/loss", "test/exact", "examples/0"} <= set(steps)
    assert set.union(*steps.values()) == {12}


def test_predict_writes_every_reply(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--config", str(run / "config.yaml"), "--ckpt_path", "last"]) == 0
    assert f"predictions  {run / 'predictions.jsonl'}" in capsys.readouterr().out
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert all(row["question"] and row["answer"] for row in rows)


def test_generate_writes_what_predict_writes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = yaml.safe_load((run / "config.yaml").read_text())
    task = DigitPages(**saved["data"]["task"]["init_args"])
    assert main(["predict", "--config", str(run / "config.yaml"), "--ckpt_path", "best"]) == 0
    expected = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    source = task.source("test", saved["data"]["seed"])
    for index in range(4):
        content = source.sample(index, 0)["messages"][0]["content"]
        content[0]["image"].save(tmp_path / "page.png")
        capsys.readouterr()
        argv = ["generate", str(run), "--image", str(tmp_path / "page.png"), "--prompt", content[1]["text"]]
        assert main([*argv, "--max-new-tokens", str(saved["model"]["reply_tokens"])]) == 0
        assert capsys.readouterr().out == expected[index]["reply"] + "\n"
        assert content[1]["text"] == expected[index]["question"]


def test_generate_draws_with_a_seed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for seed in ("1", "1", "2"):
        argv = ["generate", str(run / "model"), "--prompt", "How many 7s?", "--temperature", "1.5", "--seed", seed]
        assert main(argv) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--prompt", "x"], "nowhere: no such folder"),
        (["{tmp}", "--prompt", "x"], "neither config.json nor model/config.json"),
        (["{run}", "--prompt", "x", "--image", "{run}/metrics.json"], "metrics.json cannot be read"),
        (["{run}", "--prompt", "x", "--image", "gone.png"], "gone.png cannot be read"),
        (["{run}", "--prompt", "x", "--temperature", "-1"], "temperature: -1.0"),
        (["{run}", "--prompt", "x", "--device", "cuda:99"], "'cuda:99' cannot be used"),
        (["{run}"], "--prompt"),
    ],
)
def test_generate_refuses(
    arguments: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", *(word.format(tmp=tmp_path, run=run) for word in arguments)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert message in printed
