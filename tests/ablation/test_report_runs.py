"""Runs found in folders: how each ended, what tells it from others, which count, and what cannot be read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_runs import recipe, write_events, write_run, write_study

from hybridvl.ablation.report.cache import Cache
from hybridvl.ablation.report.cells import find_baselines, group
from hybridvl.ablation.report.labels import labelled, natural, short_names
from hybridvl.ablation.report.runs import Collected, RunFolder, collect
from hybridvl.layers.errors import ConfigError


def collected(*paths: Path) -> Collected:
    return collect(paths, Cache())


def only(path: Path) -> RunFolder:
    (run,) = collected(path).runs
    return run


def end(folder: Path, status: int, signal: int | None = None, reason: str = "") -> None:
    """Records beside a run folder, as a study leaves them."""
    start = {"key": "k", "labels": {"ratio": "1/4"}, "seed": 5, "arguments": []}
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.with_name(f"{folder.name}.json").write_text(json.dumps(start))
    ended = {"status": status, "signal": signal, "reason": reason, "ended": "2026-01-01T00:00:00+00:00"}
    folder.with_name(f"{folder.name}.ended.json").write_text(json.dumps(ended))


def test_a_run_that_is_done(tmp_path: Path) -> None:
    scalars = {"train/loss": [(1, 2.0), (2, 1.0)], "val/exact": [(2, 0.25)]}
    folder = write_run(tmp_path / "a" / "version_0", recipe(3), {"test/exact": 0.5, "val/exact": 0.75}, scalars)
    run = only(tmp_path)
    assert (run.folder, run.status, run.reason, run.seed) == (folder, "done", "", 3)
    # metrics.json says what counts; what it does not have comes from the scalars.
    assert run.metrics == {"test/exact": 0.5, "val/exact": 0.75, "train/loss": 1.0}
    assert run.facts["parameters"] == 1234
    assert run.curves["train/loss"].values.tolist() == [2.0, 1.0]


def test_runs_without_a_mark_of_their_end(tmp_path: Path) -> None:
    """Those of pipelines have one of their own; of others the test is what a fit does last."""
    write_run(tmp_path / "tested" / "v", recipe(0), {"test/exact": 0.5}, ended=False)
    write_run(tmp_path / "untested" / "v", recipe(0), {"val/exact": 0.5}, ended=False)
    no_test = recipe(0)
    no_test["run"]["test"] = False
    write_run(tmp_path / "no_test" / "v", no_test, {"val/exact": 0.5}, ended=False)
    write_run(tmp_path / "pipeline" / "v", recipe(0), {"val/exact": 0.5}, ended=False)
    (tmp_path / "pipeline" / "v" / "done.json").write_text("{}")
    found = {run.folder.parent.name: run.status for run in collected(tmp_path).runs}
    assert found == {"tested": "done", "untested": "unfinished", "no_test": "done", "pipeline": "done"}


@pytest.mark.parametrize(
    ("status", "signal", "reason", "expected"),
    [
        (3, None, "train/loss is nan", ("failed", "train/loss is nan")),
        (1, None, "", ("failed", "exit status 1, at step 7")),
        (-9, None, "Killed", ("killed", "by SIGKILL, at step 7")),
        (130, 2, "", ("killed", "by SIGINT, at step 7")),
        (0, None, "", ("unfinished", "its process ended before the run did, at step 7")),
    ],
)
def test_how_a_run_ended(
    tmp_path: Path, status: int, signal: int | None, reason: str, expected: tuple[str, str]
) -> None:
    folder = write_run(tmp_path / "ratio=1-4" / "seed_5", recipe(5, {"ratio": "1/4"}), None, {"loss": [(7, 1.0)]})
    end(folder, status, signal, reason)
    run = only(tmp_path)
    assert (run.status, run.reason) == expected
    assert run.labels == {"ratio": "1/4"}


def test_a_run_that_nothing_says_the_end_of(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a" / "seed_0", recipe(0), None, {"loss": [(7, 1.0)]})
    (folder / "progress.json").write_text(json.dumps({"doing": "train", "step": 9, "steps": 50}))
    run = only(tmp_path)
    assert (run.status, run.reason) == ("unfinished", "no record of its end: killed, or still running, at step 9 of 50")


def test_a_fit_that_was_refused_has_no_folder_but_counts(tmp_path: Path) -> None:
    end(tmp_path / "ratio=1-4" / "seed_5", 2, None, "model.net.width: 7; expected a multiple of 2")
    write_run(tmp_path / "ratio=1-2" / "seed_5", recipe(5, {"ratio": "1/2"}), {"test/exact": 0.5})
    refused, done = sorted(collected(tmp_path).runs, key=lambda run: run.status, reverse=True)
    assert (refused.status, refused.reason) == ("failed", "model.net.width: 7; expected a multiple of 2")
    assert (refused.labels, refused.seed) == ({"ratio": "1/4"}, 5)
    assert done.status == "done"


def test_a_run_folder_itself_and_overlapping_folders(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a" / "version_0", recipe(0), {"test/exact": 0.5})
    assert only(folder).folder == folder
    assert len(collected(tmp_path, folder, folder.parent).runs) == 1


def test_what_is_inside_a_run_is_no_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a" / "version_0", recipe(0), {"test/exact": 0.5})
    write_run(folder / "model", recipe(0), {"test/exact": 0.1})
    assert only(tmp_path).folder == folder


def test_a_file_above_runs_hides_none(tmp_path: Path) -> None:
    """A project may have a config.yaml, and a fit without a logger leaves its metrics where it was started."""
    first = write_run(tmp_path / "runs" / "a" / "version_0", recipe(0), {"test/exact": 0.5})
    end(tmp_path / "runs" / "ratio=1-4" / "seed_5", 2, None, "refused")
    (tmp_path / "config.yaml").write_text("name: a project\n")
    (tmp_path / "runs" / "metrics.json").write_text('{"metrics": {"test/exact": 0.1}}')
    found = collected(tmp_path)
    assert [run.folder for run in found.runs] == [first, tmp_path / "runs" / "ratio=1-4" / "seed_5"]
    assert found.problems == tuple(
        f"{place}: its config.yaml or metrics lie above runs, and are of none"
        for place in (tmp_path, tmp_path / "runs")
    )


def test_a_run_above_runs(tmp_path: Path) -> None:
    """With a recipe and metrics it is one; what a tool has written below a run is none."""
    outer = write_run(tmp_path / "a", recipe(0), {"test/exact": 0.5})
    inner = write_run(outer / "again" / "version_0", recipe(1), {"test/exact": 0.6})
    write_events(outer / "1700000000.1", {"hparams": [(1, 0.5)]})
    found = collected(tmp_path)
    assert [run.folder for run in found.runs] == [outer, inner]
    assert found.problems == ()


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    """Runs may lie on another disk; links may lead in circles."""
    scratch = write_run(tmp_path / "scratch" / "version_0", recipe(0), {"test/exact": 0.5})
    runs = tmp_path / "runs"
    own = write_run(runs / "a" / "version_0", recipe(1), {"test/exact": 0.6})
    (runs / "linked").symlink_to(scratch.parent)
    (runs / "a" / "circle").symlink_to(runs)
    (runs / "again").symlink_to(own.parent)
    (runs / "itself").symlink_to("itself")
    assert [run.folder for run in collected(runs).runs] == [own, runs / "linked" / "version_0"]
    assert len(collected(runs, tmp_path / "scratch").runs) == 2


def test_folders_without_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere: no such folder; expected run folders"):
        collected(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty: no run in it; expected folders with config\.yaml"):
        collected(tmp_path / "empty")


def test_corrupt_files_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a" / "v", recipe(0), {"test/exact": 0.5}, {"loss": [(1, 1.0)]})
    second = write_events(folder, {"val/exact": [(1, 0.5)]}, 1)
    data = bytearray(second.read_bytes())
    data[-10] ^= 255
    second.write_bytes(data)
    run = only(tmp_path)
    assert run.status == "done"
    assert set(run.curves) == {"loss"}
    (problem,) = run.problems
    assert problem.startswith(f"{second.name}: is corrupt: wrong checksum of the record at byte ")
    assert problem.endswith("; it was skipped")
    (folder / "config.yaml").write_text("a: [")
    assert any(problem.startswith("config.yaml: cannot be read: ") for problem in only(tmp_path).problems)


def test_numbers_that_are_none_are_no_metrics(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "v", recipe(0), {"test/exact": 0.5, "val/loss": float("nan")})
    run = only(tmp_path)
    assert run.metrics == {"test/exact": 0.5}
    assert run.problems == ("not a number: val/loss",)


def test_labels_of_runs_started_by_hand(tmp_path: Path) -> None:
    """The settings in which recipes differ; what changes with one of them is told, seeds and places are not."""
    for width in (16, 64):
        for seed in (0, 1):
            config = recipe(seed)
            config["model"]["net"] |= {"width": width, "mlp_width": 2 * width}
            config["model"]["optimizer"]["lr"] = 0.001 * (1 + seed)
            config["run"] |= {"name": f"w{width}", "root": str(tmp_path)}
            config["model"]["source"] = str(tmp_path / f"teacher_{seed}_{width}")
            write_run(tmp_path / f"w{width}" / f"version_{seed}", config, {"test/exact": 0.5})
    runs = collected(tmp_path).runs
    labels, together = labelled(runs)
    assert labels[0] == {"model.net.mlp_width": "32", "model.optimizer.lr": "0.001"}
    assert together == {"model.net.mlp_width": ["model.net.width"], "model.optimizer.lr": []}
    cells, notes = group(runs)
    assert [cell.name for cell in cells] == [
        f"mlp_width={width}, lr={lr}" for width in (32, 128) for lr in ("0.001", "0.002")
    ]
    assert notes == ["model.net.mlp_width: changes together with model.net.width"]


values = st.fixed_dictionaries({"a": st.integers(0, 1), "b": st.sampled_from(["x", "y"]), "c": st.booleans()})


@given(st.lists(values, min_size=1, max_size=8))
def test_cells_are_the_recipes_that_differ(chosen: list[dict[str, Any]]) -> None:
    """Whatever differs: the labels tell apart the runs whose settings differ, and no others."""
    runs = [
        RunFolder(
            folder=Path(f"/runs/{number}"),
            path=Path(f"/runs/{number}"),
            name=str(number),
            status="done",
            reason="",
            seed=number,
            labels={},
            config={"model": own, "seed_everything": number, "run": {"name": str(number)}},
            metrics={},
            facts={},
            curves={},
        )
        for number, own in enumerate(chosen)
    ]
    cells, _ = group(runs)
    found = {frozenset(run.seed for run in cell.runs) for cell in cells}
    settings = [(own["a"], own["b"], own["c"]) for own in chosen]
    assert found == {frozenset(i for i, own in enumerate(settings) if own == each) for each in settings}
    assert len({cell.name for cell in cells}) == len(cells)


def test_what_a_run_started_from_tells_it_apart(tmp_path: Path) -> None:
    """Recipes of later stages are the same but for a path; that of the first stage is where they differ."""
    for inherit in ("none", "qkvo"):
        for seed in (0, 1):
            first, second, third = (recipe(seed) for _ in range(3))
            first["model"]["student"] = {"inherit": inherit}
            folders = [tmp_path / stage / f"{inherit}_{seed}" for stage in ("first", "second", "third")]
            second["model"]["student"] = {"source": str(folders[0] / "model")}
            third["model"]["source"] = str(folders[1] / "model")
            for folder, config in zip(folders, (first, second, third), strict=True):
                write_run(folder, config, {"test/exact": 0.5})
    runs = collected(tmp_path / "third").runs
    key = "source.source.model.student.inherit"
    assert [run.origin["source"]["source"]["model"]["student"]["inherit"] for run in runs] == ["none"] * 2 + [
        "qkvo"
    ] * 2
    cells, _ = group(runs)
    assert [(cell.labels, cell.name) for cell in cells] == [({key: i}, f"inherit={i}") for i in ("none", "qkvo")]
    shutil.rmtree(tmp_path / "second")  # nothing tells them apart any more, and the report says so
    (cell,), _ = group(collected(tmp_path / "third").runs)
    assert len(cell.passed_over) == 2
    assert "differ in model.source" in cell.passed_over[0][1]


def test_runs_without_a_recipe_or_labels_go_by_their_folder(tmp_path: Path) -> None:
    """They do not make every setting of the others one in which recipes differ."""
    for seed in (0, 1):
        write_run(tmp_path / "known" / f"version_{seed}", recipe(seed), {"test/exact": 0.5})
    write_events(tmp_path / "bare" / "version_0", {"val/exact": [(1, 0.5)]})
    cells, _ = group(collected(tmp_path).runs)
    assert [(cell.labels, len(cell.runs)) for cell in cells] == [({"run": "bare"}, 1), ({"run": "known"}, 2)]
    (run,) = cells[0].runs
    assert (run.status, run.metrics) == ("unfinished", {"val/exact": 0.5})
    assert run.reason.startswith("no config.yaml")


def test_labels_beside_runs_without(tmp_path: Path) -> None:
    write_run(tmp_path / "study" / "seed_0", recipe(0, {"ratio": "1/4"}), {"test/exact": 0.5})
    for width in (16, 32):
        config = recipe(0)
        config["model"]["net"]["width"] = width
        write_run(tmp_path / f"by_hand_{width}" / "version_0", config, {"test/exact": 0.5})
    cells, _ = group(collected(tmp_path).runs)
    assert {cell.name for cell in cells} == {"ratio=1/4", "width=16", "width=32"}


def test_one_cell_of_runs_that_differ_in_their_seed(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        write_run(tmp_path / "a" / f"version_{seed}", recipe(seed), {"test/exact": seed / 10})
    (cell,), notes = group(collected(tmp_path).runs)
    assert (cell.name, cell.labels, notes) == ("all runs", {}, [])
    assert cell.values("test/exact") == {0: 0.0, 1: 0.1, 2: 0.2}


def test_of_two_runs_of_one_seed_the_newer_counts_and_the_older_is_named(tmp_path: Path) -> None:
    for version, value in enumerate((0.25, 0.75)):
        folder = write_run(tmp_path / "a" / f"version_{version}", recipe(0), {"test/exact": value})
        config = folder / "config.yaml"
        os.utime(config, (1000 + version, 1000 + version))
    (cell,), _ = group(collected(tmp_path).runs)
    assert cell.values("test/exact") == {0: 0.75}
    ((run, why),) = cell.passed_over
    assert run.name == "version_0"
    assert why == "done, but version_1 has the same labels and seed and is newer"


def test_baselines_of_cells(tmp_path: Path) -> None:
    for ratio in ("0", "1/4"):
        for window in ("16", "64"):
            labels = {"ratio": ratio, "window": window}
            write_run(tmp_path / f"{ratio.replace('/', '-')}-{window}" / "seed_0", recipe(0, labels), {"test/exact": 1})
    cells, _ = group(collected(tmp_path).runs)
    assert [tuple(cell.labels.values()) for cell in cells] == [("0", "16"), ("0", "64"), ("1/4", "16"), ("1/4", "64")]
    assert find_baselines(cells, {}) == [None] * 4
    assert find_baselines(cells, {"ratio": "1/4"}) == [2, 3, None, None]
    assert find_baselines(cells, {"ratio": "1/4", "window": "64"}) == [3, 3, 3, None]
    with pytest.raises(ConfigError, match="baseline: ration: no label; the labels are ratio, window"):
        find_baselines(cells, {"ration": "0"})
    with pytest.raises(ConfigError, match=r"baseline: ratio: '1/3'; no run has it, there are 0, 1/4"):
        find_baselines(cells, {"ratio": "1/3"})


def test_names_and_order_of_labels() -> None:
    assert short_names(["model.net.width", "model.net.vision.width", "seed"]) == {
        "model.net.width": "net.width",
        "model.net.vision.width": "vision.width",
        "seed": "seed",
    }
    assert sorted(["1", "1/8", "full*10", "0", "full*9", "1/2", "2e-1"], key=natural) == [
        *("0", "1/8", "2e-1", "1/2", "1"),
        *("full*9", "full*10"),
    ]


def test_a_second_report_reads_what_is_new_alone(tmp_path: Path) -> None:
    study = write_study(tmp_path / "ratio", {"0": [0.1, 0.2], "1/4": [0.3, 0.4]})
    first = Cache(tmp_path / "cache.npz")
    before = collect([study], first)
    first.save()
    assert first.read == 1 + 4 * 5  # study.yaml; of each run config, metrics, events and two records
    again = Cache(tmp_path / "cache.npz")
    after = collect([study], again)
    assert again.read == 0
    for one, other in zip(before.runs, after.runs, strict=True):
        assert (one.metrics, one.config, one.status) == (other.metrics, other.config, other.status)
        assert one.curves["val/exact"].values.tolist() == other.curves["val/exact"].values.tolist()
    write_run(study / "ratio=1-4" / "seed_2", recipe(2, {"ratio": "1/4"}), {"test/exact": 0.5}, {"loss": [(1, 1.0)]})
    third = Cache(tmp_path / "cache.npz")
    assert len(collect([study], third).runs) == 5
    assert third.read == 3
    third.save()
    shutil.rmtree(study / "ratio=0")
    fourth = Cache(tmp_path / "cache.npz")
    assert len(collect([study], fourth).runs) == 3
    assert fourth.read == 0


@pytest.mark.parametrize("content", [b"", b"not a cache", b"PK\x03\x04 nor this"])
def test_a_cache_that_cannot_be_read_is_none(tmp_path: Path, content: bytes) -> None:
    study = write_study(tmp_path / "ratio", {"0": [0.1]})
    (tmp_path / "cache.npz").write_bytes(content)
    cache = Cache(tmp_path / "cache.npz")
    assert len(collect([study], cache).runs) == 1
    cache.save()
    assert Cache(tmp_path / "cache.npz")._known
