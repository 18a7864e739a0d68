"""`hybridvl report`: its files against figures worked out by other means, and what it refuses."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from report_runs import recipe, write_run, write_study
from scipy import stats

from hybridvl.ablation.report.metrics import direction, is_cost, metric_label
from hybridvl.ablation.report.wording import with_interval
from hybridvl.ablation.statistics import Interval
from hybridvl.cli import main

VALUES = {"0": [0.42, 0.40, 0.47], "1/4": [0.61, 0.66, 0.70], "1": [0.60, 0.68, 0.69]}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return write_study(tmp_path / "ratio", VALUES)


def report(folder: Path) -> dict:
    return json.loads((folder / "report" / "report.json").read_text())


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_figures_of_a_study(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(study)]) == 0
    found = report(study)
    assert found["statuses"] == {"done": 9}
    assert [cell["labels"]["ratio"] for cell in found["cells"]] == ["0", "1/4", "1"]  # as the study has them
    p_values = []
    for cell in found["cells"]:
        own = VALUES[cell["labels"]["ratio"]]
        result = cell["metrics"]["test/exact"]
        low, high = stats.t.interval(0.95, 2, np.mean(own), stats.sem(own))
        assert [result[key] for key in ("mean", "low", "high")] == pytest.approx([np.mean(own), low, high])
        if cell["baseline"] is not None:
            expected = stats.ttest_rel(own, VALUES["0"])
            difference = result["difference"]
            assert difference["p"] == pytest.approx(expected.pvalue)
            interval = expected.confidence_interval()
            assert [difference["low"], difference["high"]] == pytest.approx([interval.low, interval.high])
            p_values.append((difference["p"], difference["p_holm"]))
    (small, small_corrected), (large, large_corrected) = sorted(p_values)
    assert small_corrected == pytest.approx(2 * small)
    assert large_corrected == pytest.approx(max(large, 2 * small))
    printed = capsys.readouterr().out
    assert "9 runs in 3 cells: 9 done" in printed
    assert f"{np.mean(VALUES['1/4']):.3f} [" in printed


def test_the_tables(study: Path) -> None:
    assert main(["report", str(study)]) == 0
    runs = rows(study / "report" / "report.csv")
    assert len(runs) == 9
    assert {(row["label ratio"], int(row["seed"]), float(row["test/exact"])) for row in runs} == {
        (label, seed, value) for label, values in VALUES.items() for seed, value in enumerate(values)
    }
    cells = rows(study / "report" / "cells.csv")
    assert {(row["label ratio"], row["metric"]) for row in cells} == {
        (label, metric) for label in VALUES for metric in ("test/exact", "val/exact")
    }
    by_label = {row["label ratio"]: row for row in cells if row["metric"] == "test/exact"}
    assert float(by_label["1"]["difference"]) == pytest.approx(np.mean(VALUES["1"]) - np.mean(VALUES["0"]))
    assert by_label["0"]["difference"] == ""
    text = (study / "report" / "report.md").read_text()
    assert "9 runs in 3 cells: 9 done." in text
    assert text.count("| ratio=") == 6  # results and costs


def test_another_baseline_level_and_the_bootstrap(study: Path) -> None:
    assert main(["report", str(study), "--baseline", "ratio=1", "--interval", "bootstrap", "--level", "90"]) == 0
    found = report(study)
    first = found["cells"][0]
    assert (first["baseline"], found["cells"][2]["baseline"]) == ("ratio=1", None)
    result = first["metrics"]["test/exact"]
    # All three differences have one sign, which two of eight assignments of signs reach.
    assert result["difference"]["p"] == 0.25
    assert min(VALUES["0"]) <= result["low"] < result["mean"] < result["high"] <= max(VALUES["0"])


def test_costs_are_those_of_the_plan(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(study)]) == 0
    costs = report(study)["cells"][0]["costs"]
    capsys.readouterr()
    config = study / "ratio=0" / "seed_0" / "config.yaml"
    assert main(["plan", "--config", str(config), "--context", "128", "--dtype", "float32", "--json", "-"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)
    assert costs["context"] == 128
    assert costs["state_bytes"] == plan["state_bytes"]["128"]
    assert costs["flops"] == pytest.approx(plan["flops_per_token"]["prefill"]["128"], abs=0.5)
    assert costs["decode_flops"] == plan["flops_per_token"]["decode"]["128"]
    assert costs["parameters"] == 1234  # what the run itself has counted


def test_failed_runs_are_counted_and_named(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (study / "ratio=1" / "seed_2" / "metrics.json").unlink()
    ended = {"status": 3, "signal": None, "reason": "train/loss is nan at step 40"}
    (study / "ratio=1" / "seed_2.ended.json").write_text(json.dumps(ended))
    assert main(["report", str(study)]) == 0
    found = report(study)
    assert found["statuses"] == {"done": 8, "failed": 1}
    (entry,) = found["left_out"]
    assert entry["reason"] == "failed: train/loss is nan at step 40"
    last = found["cells"][2]["metrics"]["test/exact"]
    assert last["values"] == {"0": 0.60, "1": 0.68}
    # The baseline has a seed that this cell has not: two pairs are compared.
    assert last["difference"]["by_seed"] == pytest.approx({"0": 0.18, "1": 0.28})
    printed = capsys.readouterr().out
    assert "9 runs in 3 cells: 8 done, 1 failed" in printed
    assert "ratio=1/seed_2: failed: train/loss is nan at step 40" in printed
    assert "2 of 3" in (study / "report" / "report.md").read_text()


def test_runs_of_a_study_that_were_never_started_are_named(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of nine runs two have left no trace; a third is there as a record of its start alone."""
    described = yaml.safe_load((study / "study.yaml").read_text())
    (study / "study.yaml").write_text(yaml.safe_dump({**described, "seeds": [0, 1, 2]}, sort_keys=False))
    for name in ("ratio=1/seed_2", "ratio=1-4/seed_0", "ratio=0/seed_1"):
        shutil.rmtree(study / name)
        if name != "ratio=0/seed_1":
            (study / f"{name}.json").unlink()
            (study / f"{name}.ended.json").unlink()
    assert main(["report", str(study)]) == 0
    found = report(study)
    assert found["notes"] == ["study ratio: 2 of 9 runs were not started: ratio=1/4 with seed 0; ratio=1 with seed 2"]
    assert found["statuses"] == {"done": 6, "unfinished": 1}
    assert "2 of 9 runs were not started" in capsys.readouterr().out


def test_runs_go_by_the_paths_that_were_given(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report names no folder of the machine, so that it is true where it is handed on, with the runs or without."""
    monkeypatch.chdir(study.parent)
    (study / "ratio=1" / "seed_2" / "metrics.json").unlink()
    (study / "ratio=0" / "seed_1" / "metrics.json").write_text("{")
    assert main(["report", study.name]) == 0
    found = report(study)
    folders = [f"ratio/ratio={label}/seed_{seed}" for label in ("0", "1", "1-4") for seed in range(3)]
    assert [run["folder"] for run in found["runs"]] == folders
    assert sorted(folder for cell in found["cells"] for folder in cell["runs"]) == sorted(folders)
    assert [run["run"] for run in found["left_out"]] == ["ratio/ratio=0/seed_1", "ratio/ratio=1/seed_2"]
    assert found["warnings"][0].startswith("ratio/ratio=0/seed_1: metrics.json: cannot be read")
    assert sorted(row["run"] for row in rows(study / "report" / "report.csv")) == sorted(folders)
    written = ("report.html", "report.md", "report.csv", "cells.csv", "report.json")
    assert [name for name in written if str(study.parent) in (study / "report" / name).read_text()] == []


def test_a_corrupt_event_file_is_a_warning(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = (study / "ratio=0" / "seed_1").glob("events*")
    path.write_bytes(b"x" * 100)
    for _ in range(2):  # also when it is not read again
        assert main(["report", str(study)]) == 0
        shown = capsys.readouterr()
        assert f"warning: {path.parent}: {path.name}: is corrupt: wrong checksum" in shown.err
    assert "read         0 files anew" in shown.out
    assert report(study)["statuses"] == {"done": 9}


def test_a_study_of_which_nothing_is_done(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All have failed before the first metric; the report is about that."""
    for folder in study.glob("*/seed_?"):
        for path in (folder / "metrics.json", *folder.glob("events*")):
            path.unlink()
        ended = {"status": 1, "signal": None, "reason": "no room on the disk"}
        folder.with_name(f"{folder.name}.ended.json").write_text(json.dumps(ended))
    assert main(["report", str(study)]) == 0
    found = report(study)
    assert found["statuses"] == {"failed": 9}
    assert len(found["left_out"]) == 9
    assert "no run has logged any metric yet" in found["notes"]
    assert "9 runs in 3 cells: 9 failed" in capsys.readouterr().out
    assert main(["report", str(study), "--metrics", "test/exact"]) == 2
    assert "'test/exact': no run logged it; there are none" in capsys.readouterr().err


def test_without_a_baseline_nothing_is_compared(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / "a" / f"version_{seed}", recipe(seed), {"test/exact": 0.5})
    assert main(["report", str(tmp_path)]) == 0
    (cell,) = report(tmp_path)["cells"]
    assert "difference" not in cell["metrics"]["test/exact"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--metrics", "test/exakt"],
            "'test/exakt': no run logged it; did you mean 'test/exact'? there are test/exact",
        ),
        (["--metrics", "speed"], "--metrics: 'speed': no run logged it; there are test/exact, val/exact"),
        (["--baseline", "ratio"], "--baseline: 'ratio'; expected LABEL=VALUE"),
        (["--baseline", "window=4"], "baseline: window: no label; the labels are ratio"),
        (["--baseline", "ratio=1/3"], "baseline: ratio: '1/3'; no run has it, there are 0, 1/4, 1"),
        (["--level", "100"], "--level: 100; expected a number above 0 and below 100"),
        (["--context", "0"], "--context: 0; expected at least 1 token"),
    ],
)
def test_mistakes(study: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["report", str(study), *arguments]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert not (study / "report").exists()


def test_folders_that_are_none(tmp_path: Path, study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["report", str(study), "--out", str(tmp_path / "file")]) == 2
    assert "is a file; expected a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("metric", "way", "unit"),
    [
        ("val/loss", -1, "nats"),
        ("val/cross_entropy", -1, "nats"),
        ("train/layer_3", -1, ""),
        ("speed/step_s", -1, "s"),
        ("test/decode_seconds", -1, "s"),
        ("memory/peak_rss_mib", -1, "MiB"),
        ("data/skipped", -1, ""),
        ("val/glossary_exact", 1, "share, 0 to 1"),
        ("val/loss_exact", 1, "share, 0 to 1"),
        ("test/lag_3_4_exact", 1, "share, 0 to 1"),
        ("test/digit_accuracy", 1, "share, 0 to 1"),
        ("test/inexact", 1, ""),
        ("speed/tokens_per_s", 1, "tokens/s"),
        ("speed/samples_per_s", 1, "samples/s"),
        ("val/megabytes", 1, ""),
        ("train/gradient_norm", 0, ""),
        ("state_norm/layer_03", 0, ""),
        ("train/lr", 0, ""),
    ],
)
def test_which_way_is_better_and_the_unit(metric: str, way: int, unit: str) -> None:
    """By whole words of a metric's name."""
    assert direction(metric) == way
    assert is_cost(metric) is (way < 0)
    assert metric_label(metric) == (f"{metric} ({unit})" if unit else metric)


def test_numbers_as_they_are_written() -> None:
    assert with_interval(Interval(0.25, 0.2, 0.3, 0.1, 3)) == "0.250 [0.200, 0.300]"
    assert with_interval(Interval(-0.0002968, -0.034, 0.0336, 0.01, 3), "+") == "-0.0003 [-0.034, 0.034]"
    assert with_interval(Interval(2e-5, 1e-5, 3e-5, 1e-5, 3), "+") == "+2.00e-05 [1.00e-05, 3.00e-05]"


def test_runs_of_several_studies_are_cells_of_their_own(tmp_path: Path) -> None:
    """Their labels may be equal and mean other things: each is compared with the baseline of its own study."""
    first = write_study(tmp_path / "ratio", {"0": [0.1, 0.12, 0.14], "1": [0.5, 0.55, 0.6]})
    second = write_study(tmp_path / "ratio-full", {"0": [0.9, 0.91, 0.92], "1": [0.8, 0.82, 0.85]})
    for study, baseline in ((first, "0"), (second, "1")):
        described = yaml.safe_load((study / "study.yaml").read_text())
        claim = {"claim": f"Of {study.name}.", "cell": {"ratio": "0"}, "metric": "test/exact", "below": 0.3}
        described |= {"baseline": {"ratio": baseline}, "claims": [claim], "seeds": [0, 1, 2, 3]}
        (study / "study.yaml").write_text(yaml.safe_dump(described, sort_keys=False))
    assert main(["report", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    means = {cell["name"]: cell["metrics"]["test/exact"]["mean"] for cell in found["cells"]}
    assert means == {
        "study=ratio, ratio=0": pytest.approx(0.12),
        "study=ratio, ratio=1": pytest.approx(0.55),
        "study=ratio-full, ratio=0": pytest.approx(0.91),
        "study=ratio-full, ratio=1": pytest.approx(0.8233333),
    }
    baselines = {cell["name"]: cell["baseline"] for cell in found["cells"] if cell["baseline"]}
    assert baselines == {
        "study=ratio, ratio=1": "study=ratio, ratio=0",
        "study=ratio-full, ratio=0": "study=ratio-full, ratio=1",
    }
    assert [(claim["text"], claim["verdict"]) for claim in found["claims"]] == [
        ("Of ratio.", "supported"),
        ("Of ratio-full.", "not supported"),
    ]
    missing = [note for note in found["notes"] if "not started" in note]
    assert [note.partition(":")[0] for note in missing] == ["study ratio", "study ratio-full"]
    assert "to the baseline of its study" in (tmp_path / "report" / "report.md").read_text()
    across = ["report", str(first), str(second), "--baseline", "study=ratio", "--out", str(tmp_path / "across")]
    assert main(across) == 0
    found = json.loads((tmp_path / "across" / "report.json").read_text())
    assert [cell["baseline"] for cell in found["cells"]] == [
        *(None, None, "study=ratio, ratio=0", "study=ratio, ratio=1")
    ]


def test_runs_with_equal_labels_that_differ_in_more_than_their_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, width in enumerate((32, 32, 64)):
        config = recipe(seed, {"ratio": "0"})
        config["model"]["net"]["width"] = width
        config["run"]["root"] = f"elsewhere/{seed}"
        write_run(tmp_path / "ratio=0" / f"seed_{seed}", config, {"test/exact": 0.5})
    assert main(["report", str(tmp_path)]) == 0
    shown = capsys.readouterr().err
    assert "warning: ratio=0: its runs have the same labels and differ in model.net.width\n" in shown


def test_runs_without_a_seed_are_in_no_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which of them would be pairs nobody knows."""
    for label, values in {"0": (0.1, 0.2, 0.3), "1": (0.4, 0.5, 0.6)}.items():
        for number, value in enumerate(values):
            config = recipe(number, {"ratio": label})
            del config["seed_everything"]
            write_run(tmp_path / label / f"run_{number}", config, {"test/exact": value})
    write_run(tmp_path / "0" / "seed_7", recipe(7, {"ratio": "0"}), {"test/exact": 0.2})
    assert main(["report", str(tmp_path), "--baseline", "ratio=0"]) == 0
    assert "runs without seed_everything in their recipe are in no difference: 6" in capsys.readouterr().out
    cells = json.loads((tmp_path / "report" / "report.json").read_text())["cells"]
    assert [cell["metrics"]["test/exact"]["count"] for cell in cells] == [4, 3]
    assert "difference" not in cells[1]["metrics"]["test/exact"]
