"""What a fit would refuse is refused before the runs of a study begin."""

from __future__ import annotations

from pathlib import Path

import pytest
from jsonargparse import Namespace

from hybridvl.ablation.cells import cells, runs
from hybridvl.ablation.study import Study, read_study
from hybridvl.cli import recipe_check
from hybridvl.cli.recipe_check import check_study, fit_keys
from hybridvl.layers.errors import ConfigError

RECIPES = Path(__file__).parents[2] / "recipes" / "probes"
STUDY = """
name: n
recipe: [{visual}, {recall}]
axes:
  pattern: {{key: model.net.pattern, values: [swa gdn, gdn*2]}}
  window: {{key: model.net.mixers.swa.window, values: [8, 16]}}
  {more}
"""


def _study(folder: Path, more: str) -> Study:
    path = folder / "study.yaml"
    files = {"visual": RECIPES / "visual.yaml", "recall": RECIPES / "frame_recall.yaml"}
    path.write_text(STUDY.format(**files, more=more))
    return read_study(path)


def _check(study: Study) -> None:
    check_study(study, runs(study, cells(study)))


def test_every_value_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[set[str]] = []

    def check(arguments: list[str], what: str) -> Namespace:
        read.append({word for word in arguments if word.startswith(("--model.net", "--data"))})
        return Namespace()

    monkeypatch.setattr(recipe_check, "check_fit", check)
    _check(_study(tmp_path, "frames: {key: data.task.init_args.frames, values: [2, 3, 4]}"))
    assert len(read) == 5  # of twelve cells: the first, and one for each further value
    assert len(set().union(*read)) == 2 + 2 + 3


def test_keys_depend_on_the_stage(tmp_path: Path) -> None:
    recipe = ["fit", "--config", str(RECIPES / "visual.yaml")]
    keys = fit_keys(recipe)
    assert {"model.net.pattern", "model.optimizer.lr", "trainer.max_steps", "data.task", "run.labels"} <= keys
    assert "model.student.pattern" not in keys
    assert "model.student.pattern" in fit_keys([*recipe, "--run.stage=layers"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            "lr: {key: model.optimizer.lrr, values: [1]}",
            r"axes\.lr\.key: 'model\.optimizer\.lrr' is no key of the recipe, did you mean 'model\.optimizer\.lr'\?",
        ),
        (
            "frames: {values: {few: {data.task.init_args.frame: 1}}}",
            r"axes\.frames\.values\.few: '.*frame' is no key of the recipe, did you mean '.*\.init_args\.frames'\?",
        ),
        ("size: {key: trainer.max_step, values: [1]}", r"axes\.size\.key: .*, did you mean 'trainer\.max_steps'\?"),
    ],
)
def test_keys_that_are_none(more: str, message: str, tmp_path: Path) -> None:
    study = _study(tmp_path, more)
    with pytest.raises(ConfigError, match=rf"^{study.path}: {message}"):
        _check(study)


def test_values_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = _study(tmp_path, "steps: {key: trainer.max_steps, values: [5, many]}")
    with pytest.raises(
        ConfigError, match=rf"^{study.path}: cell .*steps=many: refused for the reason above; no run was"
    ):
        _check(study)
    assert "error: trainer.max_steps: " in capsys.readouterr().err


@pytest.mark.parametrize(("key", "value"), [("trainer.logger", "false"), ("trainer.fast_dev_run", "true")])
def test_runs_that_would_never_be_done(key: str, value: str, tmp_path: Path) -> None:
    study = _study(tmp_path, f"odd: {{key: {key}, values: [{value}]}}")
    with pytest.raises(ConfigError, match=rf"^{study.path}: cell .*odd={value}: {key}: (True|False); expected "):
        _check(study)


def test_a_study_that_fits(tmp_path: Path) -> None:
    _check(_study(tmp_path, "steps: {key: trainer.max_steps, values: [5]}"))
