"""Probes through the command line: a few steps of a recipe leave accuracies sliced by load and distance."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from hybridvl.cli import main

RECIPES = Path(__file__).parents[2] / "recipes" / "probes"


@pytest.mark.parametrize(
    ("shared", "probe", "slices"),
    [
        ("text", "associative_recall", {f"pairs_{load}_lag_" for load in ("2", "3_4", "5_8")}),
        ("visual", "dense_pages", {f"digits_{load}_exact" for load in ("1", "2", "3_4")}),
    ],
)
def test_a_probe_is_fitted_and_its_slices_are_logged(shared: str, probe: str, slices: set[str], tmp_path: Path) -> None:
    files = [part for name in (shared, probe) for part in ("--config", str(RECIPES / f"{name}.yaml"))]
    steps = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--data.batch_size", "2"]
    samples = ["--data.task.init_args.val_samples", "40", "--data.task.init_args.test_samples", "6"]
    assert main(["fit", *files, *steps, *samples, "--model.reply_tokens", "2", "--run.root", str(tmp_path)]) == 0
    metrics = json.loads((tmp_path / probe / "version_0" / "metrics.json").read_text())["metrics"]
    kinds = {name.removeprefix("val/") for name in metrics if name.startswith("val/") and name.endswith("_exact")}
    assert {kind for part in slices for kind in kinds if kind.startswith(part)} == kinds
    assert all(any(kind.startswith(part) for kind in kinds) for part in slices)
    assert 0 <= metrics["test/exact"] <= 1
    events = EventAccumulator(str(min((tmp_path / probe / "version_0").glob("events.*"))))
    events.Reload()
    content = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    columns = [info.name.tag for info in HParamsPluginData.FromString(content).experiment.metric_infos]
    assert columns == ["val/loss", "val/token_accuracy", "val/exact", "test/exact"]  # no digits of pages


def test_an_impossible_size_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [
        *("--config", str(RECIPES / "text.yaml")),
        *("--config", str(RECIPES / "selective_copying.yaml")),
    ]
    assert main(["fit", *files, "--data.task.init_args.length", "3", "--run.root", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert "data.task.length: 3; expected at least the most symbols, 6" in shown
    assert "Traceback" not in shown
    assert list(tmp_path.iterdir()) == []
