"""study.yaml of a study's folder: another study is refused, cells and seeds are added only when that is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hybridvl.ablation.study import Study, read_study
from hybridvl.ablation.study_record import record_study
from hybridvl.layers.errors import ConfigError

STUDY = """
name: n
recipe: base.yaml
overrides: {trainer.max_steps: 5, model.net.pattern: "swa(window=${axes.window}) gdn*${values.k}"}
values: {k: 3}
axes:
  window: {key: model.net.mixers.swa.window, values: [16, 64]}
  ratio: {key: model.net.pattern, values: {"0": gdn*4, 1/4: swa gdn*3}}
exclude: [{window: 64, ratio: "0"}]
baseline: {window: 16}
match: params
seeds: [0, 1]
metrics: [test/exact]
"""
BASE = "model: {net: {width: 32}}\ndata: {seed: '${seed_everything}'}\n"


def _study(folder: Path, text: str = STUDY, base: str = BASE) -> Study:
    (folder / "base.yaml").write_text(base)
    (folder / "study.yaml").write_text(text)
    return read_study(folder / "study.yaml", {"root": str(folder / "runs")})


def test_what_is_written(tmp_path: Path) -> None:
    path = record_study(_study(tmp_path))
    assert path == tmp_path / "runs" / "n" / "study.yaml"
    assert yaml.safe_load(path.read_text()) == {
        "name": "n",
        "root": str(tmp_path / "runs"),
        "recipe": [str(tmp_path / "base.yaml")],
        "overrides": {"trainer.max_steps": 5, "model.net.pattern": "swa(window=${axes.window}) gdn*3"},
        "axes": {
            "window": {"key": "model.net.mixers.swa.window", "values": {"16": 16, "64": 64}},
            "ratio": {"key": "model.net.pattern", "values": {"0": "gdn*4", "1/4": "swa gdn*3"}},
        },
        "seeds": [0, 1],
        "exclude": [{"window": "64", "ratio": "0"}],
        "baseline": {"window": "16"},
        "match": [
            {
                "budget": "params",
                "by": ["model.net.mlp_width"],
                "context": None,
                "tolerance": 0.005,
                "multiple_of": 1,
            }
        ],
        "metrics": ["test/exact"],
        "tune": {},
        "claims": [],
        "base": {"model": {"net": {"width": 32}}, "data": {"seed": "${seed_everything}"}},
    }


def test_the_same_study_leaves_the_file_alone(tmp_path: Path) -> None:
    path = record_study(_study(tmp_path))
    before = path.stat()
    same = STUDY.replace("${values.k}", "3").replace("values: {k: 3}", "# a comment")
    assert record_study(_study(tmp_path, same, f"# another\n{BASE}")) == path
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_other_metrics_are_not_another_study(tmp_path: Path) -> None:
    record_study(_study(tmp_path))
    path = record_study(_study(tmp_path, STUDY.replace("[test/exact]", "[val/loss]")))
    assert yaml.safe_load(path.read_text())["metrics"] == ["val/loss"]


ADDED = [
    ("seeds: [0, 1]", "seeds: [2, 0, 1]", r"seeds: 2 added"),
    ("[16, 64]", "[8, 16, 64]", r"axes: 2 cells added, such as \{'window': '8', 'ratio': '0'\}"),
    ("1/4: swa gdn*3", "1/4: swa gdn*3, 1: swa*4", r"axes: 2 cells added, such as \{'window': '16', 'ratio': '1'\}"),
    ('exclude: [{window: 64, ratio: "0"}]', "", r"axes: 1 cells added, such as \{'window': '64', 'ratio': '0'\}"),
]


@pytest.mark.parametrize(("old", "new", "message"), ADDED)
def test_additions_are_asked_for(old: str, new: str, message: str, tmp_path: Path) -> None:
    path = record_study(_study(tmp_path))
    text = path.read_text()
    longer = _study(tmp_path, STUDY.replace(old, new))
    with pytest.raises(ConfigError, match=rf"^{path}: made with another study than .* is now: {message}; .*--extend"):
        record_study(longer)
    assert path.read_text() == text
    assert record_study(longer, extend=True) == path
    assert record_study(longer) == path
    # The shorter one would leave out runs of the longer one.
    with pytest.raises(ConfigError, match=r"without .* now; --extend adds"):
        record_study(_study(tmp_path), extend=True)


CHANGED = [
    ("trainer.max_steps: 5", "trainer.max_steps: 6", r"overrides\.trainer\.max_steps: 5, now 6"),
    ("trainer.max_steps: 5,", "", r"overrides\.trainer\.max_steps: 5, now not set"),
    ("{k: 3}", "{k: 4}", r"overrides\.model\.net\.pattern: 'swa\(window=\$\{axes\.window\}\) gdn\*3', now '.*gdn\*4'"),
    ("values: [16, 64]", "values: {16: 17, 64: 64}", r"axes\.window\.values\.16: 16, now 17"),
    ("swa.window, ", "wide.window, ", r"axes\.window\.key: 'model\.net\.mixers\.swa\.window', now '.*wide\.window'"),
    ("  window: {key", "  wide: {key", r"axes: window, ratio; now wide, ratio"),
    ("baseline: {window: 16}", "baseline: {window: 64}", r"baseline: \{'window': '16'\}, now \{'window': '64'\}"),
    ("match: params", "match: none", r"match: \[.*\], now \[\]"),
    ("seeds: [0, 1]", "seeds: [1]", r"seeds: without 0 now"),
    ("1/4: swa gdn*3", "0.25: swa gdn*3", r"axes: without the cell \{'window': '16', 'ratio': '1/4'\} now"),
    ("exclude: [{window: 64,", "exclude: [{window: 16,", r"without the cell \{'window': '16', 'ratio': '0'\} now"),
]


@pytest.mark.parametrize("extend", [False, True])
@pytest.mark.parametrize(("old", "new", "message"), CHANGED)
def test_changes_are_never_silent(old: str, new: str, message: str, extend: bool, tmp_path: Path) -> None:
    path = record_study(_study(tmp_path))
    text = path.read_text()
    changed = STUDY.replace(old, new)
    if old.startswith("  window"):
        changed = changed.replace("axes.window", "axes.wide").replace("window: 64,", "wide: 64,")
        changed = changed.replace("{window: 16}", "{wide: 16}")
    with pytest.raises(ConfigError, match=rf"^{path}: made with another study than .*: .*{message}"):
        record_study(_study(tmp_path, changed), extend)
    assert path.read_text() == text


def test_another_recipe_is_another_study(tmp_path: Path) -> None:
    path = record_study(_study(tmp_path))
    changed = _study(tmp_path, base=BASE.replace("32", "64"))
    with pytest.raises(ConfigError, match=rf"^{path}: .*base\.model\.net\.width: 32, now 64; --extend adds"):
        record_study(changed, extend=True)


def test_a_file_that_is_no_study(tmp_path: Path) -> None:
    path = record_study(_study(tmp_path))
    path.write_text("a: [")
    with pytest.raises(ConfigError, match=rf"^{path}: .*expected YAML"):
        record_study(_study(tmp_path))
