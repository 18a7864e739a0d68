"""TensorBoard itself on a small study of real fits: what its pages show of runs, axes and metrics."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import cli_runs
import pytest

from hybridvl.ablation.cells import cells, runs
from hybridvl.ablation.study import read_study
from hybridvl.cli import main

STUDY = """
name: study
root: runs
recipe: tiny.yaml
axes:
  ratio: {key: model.net.pattern, values: {"0": gdn*2, 1/2: swa gdn}}
  window: {key: model.net.mixers.swa.window, values: [8, 16]}
exclude: [{ratio: "0", window: 16}, {ratio: 1/2, window: 8}]
baseline: {ratio: 1/2, window: 16}
seeds: [0, 1]
metrics: [test/exact, val/loss, val/cell_exact]
"""
RECIPE = "{run: {threads: 1}, trainer: {max_steps: 2, val_check_interval: 2}, examples: {count: 0}}"
RUNS = {f"{cell}/seed_{seed}" for cell in ("ratio=0,window=8", "ratio=1-2,window=16") for seed in (0, 1)}
METRICS = ["test/exact", "val/loss", "val/cell_exact"]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study whose runs are done, each by the very command that a sweep starts."""
    folder = tmp_path_factory.mktemp("tensorboard")
    before = Path.cwd()
    os.chdir(folder)
    try:
        cli_runs.recipe(folder, "tiny", RECIPE)
        Path("study.yaml").write_text(STUDY)
        found = read_study(Path("study.yaml"))
        assert [main(run.arguments) for run in runs(found, cells(found))] == [0] * len(RUNS)
    finally:
        os.chdir(before)
    return folder / "runs" / "study"


@pytest.fixture(scope="module")
def address(study: Path) -> Iterator[str]:
    """Where TensorBoard serves the study."""
    where = ("--host", "127.0.0.1", "--port", "0", "--load_fast", "false")
    log = study.parent / "tensorboard.log"
    with log.open("wb") as output:
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(study), *where]
        server = subprocess.Popen(command, stdout=output, stderr=output)
    until = time.monotonic() + 120
    try:
        while not (found := re.search(r"http://[\d.]+:\d+/", log.read_text())):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        while set(_asked(f"{found[0]}data/runs")) < RUNS:  # it reads the files meanwhile
            assert time.monotonic() < until
            time.sleep(0.2)
        yield found[0]
    finally:
        server.terminate()
        server.wait(20)


def _asked(address: str, content: dict[str, Any] | None = None) -> Any:
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def test_hparams_have_the_runs_axes_and_metrics_and_nothing_else(address: str, study: Path) -> None:
    experiment = _asked(f"{address}data/plugin/hparams/experiment", {})
    columns = {info["name"]: info["type"] for info in experiment["hparamInfos"]}
    assert columns == dict.fromkeys(("ratio", "window", "seed"), "DATA_TYPE_STRING")
    assert [info["name"]["tag"] for info in experiment["metricInfos"]] == METRICS
    statuses = [f"STATUS_{name}" for name in ("UNKNOWN", "SUCCESS", "FAILURE", "RUNNING")]
    asked = {"allowedStatuses": statuses, "colParams": [], "startIndex": 0, "sliceSize": 100}
    # Sorted by an axis whose labels look like numbers in part.
    asked["colParams"] = [{"hparam": "ratio", "order": "ORDER_DESC"}]
    rows = _asked(f"{address}data/plugin/hparams/session_groups", asked)["sessionGroups"]
    assert {row["name"] for row in rows} == RUNS
    assert [row["hparams"]["ratio"] for row in rows] == ["1/2", "1/2", "0", "0"]
    for row in rows:
        ratio, window = ("0", "8") if "ratio=0" in row["name"] else ("1/2", "16")
        assert [session["status"] for session in row["sessions"]] == ["STATUS_SUCCESS"]
        assert row["hparams"] == {"ratio": ratio, "window": window, "seed": row["name"][-1]}
        written = json.loads((study / row["name"] / "metrics.json").read_text())["metrics"]
        shown = {value["name"]["tag"]: value["value"] for value in row["metricValues"]}
        assert shown == {tag: pytest.approx(written[tag]) for tag in METRICS}


@browser.NEEDS_CHROMIUM
def test_the_pages_in_a_browser(address: str, tmp_path: Path) -> None:
    with browser.opened(tmp_path / "profile") as page:
        texts = page.texts(f"{address}#hparams", {"Show Metrics", *RUNS, *METRICS})
        table = texts[texts.index("Trial ID") :]
        assert table[:8] == ["Trial ID", "Show Metrics", "ratio", "seed", "window", *METRICS]
        rows = {tuple(table[start : start + 4]) for start in range(8, len(table), 7)}
        assert rows == {
            (name, *(("0", name[-1], "8") if "ratio=0" in name else ("1/2", name[-1], "16"))) for name in RUNS
        }
        page.picture(tmp_path / "hparams.png")
        charts = {"Quality", "exact answers", "exact answers by kind", "loss", "Training", "Cost", "memory (MiB)"}
        assert {*charts, *RUNS} <= set(page.texts(f"{address}#custom_scalars", {*charts, *RUNS}))
        settings = {"setting", "ratio", "1/2", "pattern", "swa gdn", "gdn*2", "trained parameters"}
        assert {*settings, *RUNS} <= set(page.texts(f"{address}#text", {*settings, *RUNS}))
    assert (tmp_path / "hparams.png").stat().st_size > 20_000
