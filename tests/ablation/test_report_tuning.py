"""A label that is tuned for each cell by itself: the best by validation is reported, the others are passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_runs import recipe, write_run

from hybridvl.ablation.report.analysis import Analysis, analyse
from hybridvl.ablation.report.cache import Cache
from hybridvl.ablation.report.cells import Settings
from hybridvl.ablation.report.runs import collect
from hybridvl.ablation.study import read_study
from hybridvl.cli import main
from hybridvl.layers.errors import ConfigError

# By mixer and learning rate: the validation's loss, and the test's score, which would have another choice made.
LOSSES = {"gdn": {"0.001": 0.5, "0.003": 0.3, "0.01": 0.9}, "swa": {"0.001": 0.4, "0.003": 0.6, "0.01": 0.7}}
SCORES = {"gdn": {"0.001": 0.5, "0.003": 0.7, "0.01": 0.9}, "swa": {"0.001": 0.6, "0.003": 0.8, "0.01": 0.1}}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    for mixer, losses in LOSSES.items():
        for lr, loss in losses.items():
            for seed in (0, 1):
                score = SCORES[mixer][lr] + 0.02 * seed
                metrics = {"val/loss": loss + 0.01 * seed, "val/exact": score, "test/exact": score}
                labels = {"mixer": mixer, "lr": lr}
                write_run(tmp_path / f"{mixer}-{lr}" / f"seed_{seed}", recipe(seed, labels), metrics)
    return tmp_path


def analysed(study: Path, settings: Settings) -> Analysis:
    return analyse(collect([study], Cache()), settings)


def test_each_cell_has_its_own_best(study: Path) -> None:
    analysis = analysed(study, Settings(baseline={"mixer": "swa"}, tune={"lr": "val/loss"}))
    assert [(cell.name, dict(cell.labels)) for cell in analysis.cells] == [
        ("mixer=gdn", {"mixer": "gdn"}),
        ("mixer=swa", {"mixer": "swa"}),
    ]
    gdn, swa = analysis.results["test/exact"]
    assert gdn.values == pytest.approx({0: 0.7, 1: 0.72})
    assert swa.values == pytest.approx({0: 0.6, 1: 0.62})
    assert gdn.difference is not None
    assert gdn.difference.differences == pytest.approx((0.1, 0.1))
    assert analysis.notes[:2] == [
        "mixer=gdn: with lr=0.003, the best by val/loss (0.305; 0.505 with lr=0.001; 0.905 with lr=0.01)",
        "mixer=swa: with lr=0.001, the best by val/loss (0.405; 0.605 with lr=0.003; 0.705 with lr=0.01)",
    ]
    assert len(analysis.left_out) == 8
    run, why = analysis.left_out[0]
    assert why == "done, but mixer=gdn is best with lr=0.003 by val/loss: 0.305, not 0.505"
    assert run.labels == {"mixer": "gdn", "lr": "0.001"}


def test_of_scores_the_highest_is_best(study: Path) -> None:
    analysis = analysed(study, Settings(tune={"lr": "val/exact"}))
    assert [result.interval.mean for result in analysis.results["test/exact"]] == pytest.approx([0.91, 0.81])


def test_what_is_chosen_by_the_test_is_refused(study: Path) -> None:
    with pytest.raises(ConfigError, match=r"tune: lr: 'test/exact'; expected a metric of the validation"):
        analysed(study, Settings(tune={"lr": "test/exact"}))


def test_one_lucky_seed_does_not_win(study: Path) -> None:
    """The best learning rate of gdn with a failed seed passes over to the next best that has both."""
    (study / "gdn-0.003" / "seed_1" / "metrics.json").unlink()
    analysis = analysed(study, Settings(baseline={"mixer": "swa"}, tune={"lr": "val/loss"}))
    assert analysis.results["test/exact"][0].values == pytest.approx({0: 0.5, 1: 0.52})
    whys = [why for run, why in analysis.left_out if run.labels == {"mixer": "gdn", "lr": "0.003"}]
    assert "done, but mixer=gdn is best with lr=0.001 by val/loss: 0.505, not 0.3, of 1 seeds alone" in whys


def test_two_labels_one_after_the_other(study: Path) -> None:
    (cell,) = analysed(study, Settings(tune={"lr": "val/loss", "mixer": "val/loss"})).cells
    assert (cell.name, dict(cell.labels), len(cell.runs)) == ("all runs", {}, 12)
    assert cell.values("val/loss") == pytest.approx({0: 0.3, 1: 0.31})


def test_asked_for_by_the_study_and_on_the_command_line(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    axes = {name: {"key": "k", "values": values} for name, values in (("mixer", [*LOSSES]), ("lr", [*LOSSES["gdn"]]))}
    content: dict[str, Any] = {"name": "tuned", "axes": axes, "seeds": [0, 1], "metrics": ["test/exact"]}
    content |= {"baseline": {"mixer": "swa", "lr": "0.01"}, "tune": {"lr": "val/loss"}}
    (study / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    assert main(["report", str(study)]) == 0
    found = json.loads((study / "report" / "report.json").read_text())
    assert [(cell["name"], cell["baseline"]) for cell in found["cells"]] == [
        ("mixer=gdn", "mixer=swa"),
        ("mixer=swa", None),
    ]
    assert not any("not started" in note for note in found["notes"])
    (study / "study.yaml").write_text(
        yaml.safe_dump({**content, "tune": {"lr": "val/other"}, "baseline": {}}, sort_keys=False)
    )
    assert main(["report", str(study)]) == 0
    notes = json.loads((study / "report" / "report.json").read_text())["notes"]
    assert "nothing is tuned yet: no run logged val/other" in notes
    capsys.readouterr()
    for arguments, message in [
        (["--tune", "lr"], "--tune: 'lr'; expected LABEL=VALUE, such as lr=val/loss"),
        (["--tune", "rate=val/loss"], "tune: rate: no label; the labels are mixer, lr"),
        (["--tune", "lr=val/los"], "'val/los': no run logged it; did you mean 'val/loss'?"),
    ]:
        assert main(["report", str(study), *arguments]) == 2
        assert message in capsys.readouterr().err


def test_what_a_study_file_may_say(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: {net: {pattern: gdn}, optimizer: {lr: 0.1}}\n")
    content: dict[str, Any] = {
        "name": "mini",
        "recipe": "recipe.yaml",
        "axes": {"lr": {"key": "model.optimizer.lr", "values": [0.001, 0.01]}},
        "tune": {"lr": "val/loss"},
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    assert read_study(path).tune == {"lr": "val/loss"}
    for given, message in [
        ({"rl": "val/loss"}, r"tune\.rl: unknown key; known here are lr"),
        ({"lr": 3}, r"tune\.lr: 3; expected the tag of a metric"),
        ({"lr": "test/exact"}, r"tune\.lr: 'test/exact'; expected the tag of a metric of the validation"),
        (["lr"], r"tune: \['lr'\]; expected a mapping of axes to tags of metrics"),
    ]:
        path.write_text(yaml.safe_dump({**content, "tune": given}))
        with pytest.raises(ConfigError, match=message):
            read_study(path)
