"""What runs again and what is skipped, with fits that only pretend, and how stages that fail are told of."""

from __future__ import annotations

import fcntl
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridvl.layers.errors import ConfigError
from hybridvl.pipeline.description import Pipeline, read_pipeline
from hybridvl.pipeline.processes import Ended
from hybridvl.pipeline.runner import StageFailed, plan_steps, run_pipeline


class Fits:
    """Stands for `hybridvl fit`: leaves a checkpoint and a model, and remembers what it was asked.

    ends: by stage, how it ends in place of well; without a model then.
    """

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.ends: dict[str, Ended] = {}
        self.leaves_checkpoint = True
        self.leaves_model = True

    def __call__(self, arguments: list[str]) -> Ended:
        assert arguments[0] == "fit"
        flags = dict(word[2:].split("=", 1) for word in arguments if "=" in word)
        self.asked.append(flags)
        folder = Path(flags["run.root"], flags["run.name"], flags["run.version"])
        if self.leaves_checkpoint:
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            (folder / "checkpoints" / "last.ckpt").touch()
        if flags["run.name"] in self.ends:
            return self.ends[flags["run.name"]]
        if self.leaves_model:
            (folder / "model").mkdir(parents=True, exist_ok=True)
            (folder / "model" / "config.json").write_text("{}")
        return Ended(0, None)

    def stages(self) -> list[str]:
        """The stages that were asked for since the last call."""
        names = [flags["run.name"] for flags in self.asked]
        self.asked.clear()
        return names


def _silent(line: str) -> None:
    return


Make = Callable[..., Pipeline]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A pipeline a -> b -> d, c alone; each stage with the overrides given for it."""

    def make(recipe: str = "run: {threads: 1}", needs: dict[str, str] | None = None, **overrides: Any) -> Pipeline:
        return _pipeline(tmp_path, {"b": "a", "d": "b"} if needs is None else needs, overrides, recipe)

    return make


def _pipeline(folder: Path, needs: dict[str, str], overrides: dict[str, Any], recipe: str = "") -> Pipeline:
    stages = {}
    for name in "abcd":
        sources = {f"model.source_{n}": f"${{stages.{n}.model}}" for n in needs.get(name, "")}
        (folder / f"{name}.yaml").write_text("run: {test: false}")
        stages[name] = {"recipe": f"{name}.yaml", "overrides": {**sources, **overrides.get(name, {})}}
    (folder / "a.yaml").write_text(recipe or "run: {threads: 1}")
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"name": "p", "root": str(folder / "runs"), "stages": stages}, sort_keys=False))
    return read_pipeline(path)


def _versions(pipeline: Pipeline, stage: str) -> list[str]:
    return sorted(path.name for path in (pipeline.folder / stage).iterdir() if path.is_dir())


def test_what_is_done_is_skipped_and_what_changed_runs_again_with_all_that_start_from_it(make: Make) -> None:
    fits = Fits()
    run_pipeline(make(), fits, say=_silent)
    assert fits.stages() == ["a", "b", "c", "d"]
    run_pipeline(make(), fits, say=_silent)
    assert fits.stages() == []

    changed = make(b={"model.optimizer.lr": 0.1})
    assert [(step.stage.name, step.action) for step in plan_steps(changed)] == [
        *(("a", "skip"), ("b", "run"), ("c", "skip"), ("d", "run"))
    ]
    assert plan_steps(changed)[3].why == "after b"
    run_pipeline(changed, fits, say=_silent)
    assert fits.stages() == ["b", "d"]
    assert [_versions(changed, stage)[-1] for stage in "abcd"] == ["version_0", "version_1", "version_0", "version_1"]

    # Back to what was there first: its runs are still done.
    runs = run_pipeline(make(), fits, say=_silent)
    assert fits.stages() == []
    assert [run.folder.name for run in runs] == ["version_0"] * 4


def test_comments_and_other_files_of_a_recipe_change_nothing_but_its_values_do(make: Make) -> None:
    fits = Fits()
    run_pipeline(make(), fits, say=_silent)
    fits.stages()
    run_pipeline(make(recipe="# a comment\nrun:\n    threads: 1\n"), fits, say=_silent)
    assert fits.stages() == []
    run_pipeline(make(recipe="run: {threads: 2}"), fits, say=_silent)
    assert fits.stages() == ["a", "b", "d"]


def test_stages_are_given_the_models_and_folders_of_earlier_ones(make: Make) -> None:
    fits = Fits()
    overrides = {
        "data.task": {"path": "${stages.a.folder}/x"},
        "run.test": False,
        "data.system": None,
        "model.lr": 1e-5,
    }
    pipeline = make(c=overrides, needs={"b": "a"})
    run_pipeline(pipeline, fits, say=_silent)
    _, b, c, _ = fits.asked
    assert b["model.source_a"] == str(pipeline.folder / "a" / "version_0" / "model")
    assert yaml.safe_load(c["data.task"]) == {"path": str(pipeline.folder / "a" / "version_0" / "x")}
    assert (c["run.test"], c["data.system"], float(c["model.lr"])) == ("false", "null", 1e-5)
    assert (c["run.root"], c["run.name"], c["run.version"]) == (str(pipeline.folder), "c", "version_0")
    assert all("ckpt_path" not in flags for flags in fits.asked)


def test_a_killed_stage_goes_on_and_a_changed_one_does_not(make: Make) -> None:
    fits = Fits()
    fits.ends["b"] = Ended(-signal.SIGKILL, None)
    checkpoint = make().folder / "b" / "version_0" / "checkpoints" / "last.ckpt"
    for again in range(2):
        with pytest.raises(
            StageFailed, match=rf"'b' was ended by SIGKILL.*memory.*goes on from {checkpoint}"
        ) as failed:
            run_pipeline(make(), fits, say=_silent)
        assert failed.value.status == 137
        assert ("ckpt_path" in fits.asked[-1]) == bool(again)
        assert fits.asked[-1].get("ckpt_path", str(checkpoint)) == str(checkpoint)
    assert fits.stages() == ["a", "b", "b"]

    fits.ends.clear()
    other = make(b={"model.optimizer.lr": 0.1})
    assert plan_steps(other)[1].run.folder.name == "version_1"
    run_pipeline(make(), fits, say=_silent)
    assert fits.asked[0]["run.version"] == "version_0"
    assert fits.stages() == ["b", "c", "d"]
    run_pipeline(other, fits, say=_silent)
    assert (fits.asked[0]["run.version"], "ckpt_path" in fits.asked[0]) == ("version_1", False)


def test_a_stage_that_ended_before_its_first_checkpoint_begins_again(make: Make) -> None:
    fits = Fits()
    fits.leaves_checkpoint = False
    fits.ends["a"] = Ended(1, None)
    with pytest.raises(StageFailed, match=r"'a' failed with exit status 1.*mended, the same command starts the stage"):
        run_pipeline(make(), fits, say=_silent)
    # Such a fit left no folder at all, as one whose settings are refused: its number is free again.
    assert list((make().folder / "a").iterdir()) == []

    (make().folder / "a" / "version_0").mkdir()  # this one did
    with pytest.raises(StageFailed):
        run_pipeline(make(), fits, say=_silent)
    assert fits.asked[-1]["run.version"] == "version_1"


@pytest.mark.parametrize(
    ("ended", "status", "message"),
    [
        (Ended(2, None), 2, "failed with exit status 2"),
        (Ended(-signal.SIGSEGV, None), 139, "was ended by SIGSEGV; the same command"),
        (Ended(1, signal.SIGINT), 130, "was interrupted; the same command goes on from"),
        (Ended(0, signal.SIGTERM), 143, "was interrupted"),
    ],
)
def test_how_a_stage_ended_is_told(ended: Ended, status: int, message: str, make: Make) -> None:
    fits = Fits()
    fits.ends["c"] = ended
    with pytest.raises(StageFailed, match=f"^stage 'c' {message}") as failed:
        run_pipeline(make(), fits, say=_silent)
    assert failed.value.status == status
    assert fits.stages() == ["a", "b", "c"]


def test_from_runs_a_stage_and_the_later_ones_again(make: Make) -> None:
    fits = Fits()
    run_pipeline(make(), fits, say=_silent)
    fits.stages()
    fits.ends["c"] = Ended(-signal.SIGKILL, None)
    with pytest.raises(StageFailed):
        run_pipeline(make(), fits, "b", _silent)
    assert fits.stages() == ["b", "c"]
    fits.ends.clear()
    # Without --from the newest run of a stage counts: it is not finished, and goes on.
    run_pipeline(make(), fits, say=_silent)
    assert (fits.asked[0]["run.version"], "ckpt_path" in fits.asked[0]) == ("version_1", True)
    assert fits.stages() == ["c", "d"]
    with pytest.raises(ConfigError, match="--from: no stage is called 'e'; the stages are a, b, c, d"):
        plan_steps(make(), "e")


def test_a_stage_without_a_model_or_with_a_damaged_record_is_not_done(make: Make) -> None:
    fits = Fits()
    fits.leaves_model = False
    with pytest.raises(ConfigError, match=r"a/version_0/model: no model, though the fit ended well"):
        run_pipeline(make(), fits, say=_silent)
    fits.leaves_model = True
    run_pipeline(make(), fits, say=_silent)
    fits.stages()
    (make().folder / "c" / "version_0" / "done.json").write_text('{"key": ')
    (make().folder / "d" / "version_0" / "model" / "config.json").unlink()
    assert [step.action for step in plan_steps(make())] == ["skip", "skip", "resume", "resume"]
    (make().folder / "c" / "version_0.json").write_text("")
    assert [step.run.folder.name for step in plan_steps(make())] == [*["version_0"] * 2, "version_1", "version_0"]


def test_one_process_at_a_time(make: Make) -> None:
    run_pipeline(make(), Fits(), say=_silent)
    with (make().folder / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process runs this pipeline now"):
            run_pipeline(make(), Fits(), say=_silent)


def test_a_root_that_cannot_be_made(make: Make, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(ConfigError, match=r"root: .*cannot be written: Not a directory"):
        run_pipeline(make(), Fits(), say=_silent)


@settings(max_examples=12, deadline=None)
@given(
    needs=st.fixed_dictionaries(
        {"b": st.sets(st.sampled_from("a")), "c": st.sets(st.sampled_from("ab")), "d": st.sets(st.sampled_from("abc"))}
    ),
    changed=st.sets(st.sampled_from("abcd")),
)
def test_exactly_what_depends_on_a_change_runs_again(
    needs: dict[str, set[str]], changed: set[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, fits = tmp_path_factory.mktemp("dag"), Fits()
    before = {name: "".join(sorted(sources)) for name, sources in needs.items()}
    run_pipeline(_pipeline(folder, before, {}), fits, say=_silent)
    fits.stages()
    after = _pipeline(folder, before, {name: {"model.lr": 0.5} for name in changed})
    expected = set(changed)
    for name in "abcd":
        if needs.get(name, set()) & expected:
            expected.add(name)
    assert {step.stage.name for step in plan_steps(after) if step.action == "run"} == expected
    run_pipeline(after, fits, say=_silent)
    assert fits.stages() == sorted(expected)
