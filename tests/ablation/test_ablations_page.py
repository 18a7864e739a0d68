"""docs/ablations.md runs as it stands, and names every key of a study."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from hybridvl.ablation import study as study_module
from hybridvl.ablation.cells import cell_name, cells
from hybridvl.ablation.matching import match_cells
from hybridvl.ablation.search.space import SEARCH_KEYS
from hybridvl.ablation.study import read_study

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "ablations.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
WHOLE, MATCH, SEARCH = (text for kind, text in BLOCKS if kind == "yaml")


def _study(folder: Path, text: str) -> Path:
    path = folder / "study.yaml"
    path.write_text(text.replace("../recipes", str(ROOT / "recipes")))
    return path


def test_the_study_is_what_the_page_says(tmp_path: Path) -> None:
    study = read_study(_study(tmp_path, WHOLE))
    matched = {entry.cell.name: entry for entry in match_cells(study, cells(study))}
    assert len(matched) == 3 * 2 * 2 - 2
    assert matched["ratio=1-4,window=8,size=small"].solved == {}
    other = matched["ratio=1,window=8,size=large"]
    assert other.cell.overrides["model.net.pattern"] == "swa(window=8)*8"
    assert other.solved.keys() == {"model.net.mlp_width"}
    assert abs(other.residuals["params"]) <= 0.005


def test_the_folder_of_a_long_label() -> None:
    assert f"`{cell_name({'pattern': '(swa gdn*3)*2'})}`" in PAGE


def test_two_budgets(tmp_path: Path) -> None:
    start = WHOLE[: WHOLE.index("axes:")]
    axes = "axes: {model: {key: model.net.pattern, values: [swa gdn*3, swa*4, gdn*4]}}\n"
    study = read_study(_study(tmp_path, start + axes + MATCH))
    _, window, linear = match_cells(study, cells(study))
    assert window.solved.keys() == {"model.net.mixers.swa.window", "model.net.mlp_width"}
    assert linear.solved.keys() == {"model.net.mixers.gdn.head_dim", "model.net.mlp_width"}


def test_a_search(tmp_path: Path) -> None:
    start = WHOLE[: WHOLE.index("axes:")]
    study = read_study(_study(tmp_path, start + SEARCH))
    assert study.search is not None
    assert study.search.trials == 24
    assert [axis.range is None for axis in study.axes] == [False, False, True]


def test_the_example_prints_what_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    (code,) = (text for kind, text in BLOCKS if kind == "python")
    (shown,) = (text for kind, text in BLOCKS if not kind)
    exec(compile(code, "ablations.md", "exec"), {})
    assert capsys.readouterr().out == shown


def test_every_key_has_a_row() -> None:
    rows = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (.*?) \|", PAGE, re.MULTILINE))))
    assert set(study_module._KEYS) | set(study_module._MATCH_KEYS) | set(SEARCH_KEYS) <= rows


def test_the_commands_read_their_studies() -> None:
    commands = [shlex.split(line) for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
    assert len(commands) >= 2
    for command in commands:
        assert command[:2] == ["hybridvl", "sweep"]
        flags = dict(zip((word.removeprefix("--") for word in command[3::2]), command[4::2], strict=True))
        study = read_study(ROOT / command[2], flags)
        assert study.name == flags["name"]
        assert cells(study)


def test_every_study_is_listed() -> None:
    for folder in ("ablations", "ablations/full"):
        files = {path.name for path in (ROOT / folder).glob("*.yaml")} - {"model.yaml"}
        assert files <= set(re.findall(r"^\| `(\w+\.yaml)` \|", PAGE, re.MULTILINE)), folder
