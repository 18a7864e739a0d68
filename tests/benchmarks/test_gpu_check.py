"""benchmarks/gpu_check.py where there is no GPU: it says so, and its dry run goes through all of it at tiny sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from traced_steps import TraceRecorder

from hybridvl.inference.graphs import StepGraphs
from hybridvl.models.config import ModelConfig, VisionConfig
from hybridvl.models.vlm import VisionLanguageModel

ROOT = Path(__file__).parents[2]
OURS = {"ours (auto)", "ours (torch)"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "HYBRIDVL_BACKEND"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)


def test_without_a_gpu_it_ends_with_one_line() -> None:
    done = run()
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("gpu_check: no CUDA device here")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("gpu_check") / "report.json"
    done = run("--cpu-dry-run", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text())


def test_a_dry_run_checks_and_times_every_case(report: dict) -> None:
    assert report["dry_run"]
    assert report["wrong"] == []
    assert report["machine"]["versions"]["torch"] == torch.__version__
    assert all(check["passed"] for check in report["checks"])
    for record in report["cases"]:
        ran = {name: found for name, found in record["sides"].items() if found["correct"]}
        assert ran.keys() >= ({"ours"} if "layer" in record["case"] else OURS)
        assert all(found["median_s"] > 0 for found in ran.values())
        assert all("error" in found for name, found in ran.items() if name in OURS)
        assert all(found["reason"] for found in record["sides"].values() if not found["correct"])


def test_a_dry_run_measures_every_figure_of_models(report: dict) -> None:
    figures = [record["figure"].split(" of ")[0] for record in report["models"]]
    assert figures == [
        "decode a token at 16 tokens",
        "decode a token at 100 tokens",
        "a frame",
        "prefill",
        "training step",
    ]
    assert all(record["median_s"] > 0 for record in report["models"])


def test_a_dry_run_goes_through_streams(report: dict) -> None:
    streams = report["streams"]
    assert streams["wrong"] == []
    assert [check["step"] for check in streams["checks"]] == [
        "frames from 8 to 72, window 40",
        "tokens from 38 to 42, window 40",
    ]
    assert [record["figure"] for record in streams["records"]] == [
        *(f"a token of swa gdn*3 at {context}" for context in (0, 16, 100)),
        *["a frame of 16 tokens, end to end"] * 2,
        "a token of swa gdn*3 at 64",
        "a token of full*4 at 64",
        "a token of swa*4 at 64",
    ]
    assert all(record.get("median_s", record.get("mean_s")) > 0 for record in streams["records"])
    assert all(record["how"] != "CUDA graph" for record in [*streams["records"], *streams["checks"]])
    assert len(streams["goals"]) == 5


def test_the_measured_model_has_infinitevls_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from gpu_models import ModelSizes

    sizes = ModelSizes.infinitevl()
    assert sizes.config == ModelConfig(vision=VisionConfig())
    with torch.device("meta"):
        assert VisionLanguageModel(sizes.config).num_params == sizes.parameters


@pytest.mark.parametrize("reads", [False, True])
def test_recorded_steps_that_compute_otherwise_are_told(reads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps whose recording reads a length on the host go on with that length, as a graph would."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu_streams
    from gpu_models import Clock, ModelSizes, measured_model

    sizes, streams = ModelSizes.tiny(), gpu_streams.StreamSizes.tiny()
    torch.manual_seed(0)
    model = measured_model(sizes, "cpu", torch.float32)
    recorders: list[TraceRecorder] = []

    def recorded(model: VisionLanguageModel) -> StepGraphs:
        recorders.append(TraceRecorder(reads))
        return StepGraphs(model, recorder=recorders[-1])

    monkeypatch.setattr(gpu_streams, "StepGraphs", recorded)
    checks = gpu_streams.wrap_checks(model, 16, streams.steps)
    assert [(recorder.made, recorder.replayed) for recorder in recorders] == [(1, streams.steps - 1)] * 2
    assert [check["how"] for check in checks] == [gpu_streams.GRAPH] * 2
    if not reads:
        assert max(check["error"] for check in checks) < 1e-4
        return
    assert min(check["error"] for check in checks) > 0.1
    report = gpu_streams.measure_streams(model, sizes, streams, "cpu", Clock("cpu", 1))
    assert [wrong.split(":")[0] for wrong in report["wrong"]] == [check["step"] for check in checks]
    assert report["records"] == []
