"""Cells and runs of a study: what each sets, and where it lies."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridvl.ablation.cells import baseline_of, cell_name, cells, runs
from hybridvl.ablation.recipes import merged_recipe
from hybridvl.ablation.study import Study, read_study
from hybridvl.layers.errors import ConfigError

STUDY = """
name: ratio
root: out
recipe: base.yaml
overrides: {model.net.pattern: swa, data.note: "${axes.ratio}/${axes.depth}"}
axes:
  ratio: {key: model.net.pattern, values: {"0": "gdn*${axes.depth}", 1/4: "(swa(window=${axes.window}) gdn*3)*2"}}
  window: {key: model.net.mixers.swa.window, values: [16, 64]}
  depth: {values: [8]}
  size: {values: {small: {model.net.width: 64, model.optimizer: {lr: 0.1}}, same: {}}}
exclude: [{ratio: "0", window: 64}]
baseline: {ratio: 1/4, size: same}
seeds: [7, 2]
"""
BASE = "model: {net: {pattern: swa gdn, width: 32}, optimizer: {lr: 1}}\n"


def _study(folder: Path, text: str = STUDY, base: str = BASE) -> Study:
    (folder / "base.yaml").write_text(base)
    (folder / "study.yaml").write_text(text)
    return read_study(folder / "study.yaml")


def test_cells_are_the_grid_without_what_is_excluded(tmp_path: Path) -> None:
    found = cells(_study(tmp_path))
    assert [tuple(cell.labels.values()) for cell in found] == [
        ("0", "16", "8", "small"),
        ("0", "16", "8", "same"),
        ("1/4", "16", "8", "small"),
        ("1/4", "16", "8", "same"),
        ("1/4", "64", "8", "small"),
        ("1/4", "64", "8", "same"),
    ]
    assert [cell.name for cell in found[:3]] == [
        "ratio=0,window=16,depth=8,size=small",
        "ratio=0,window=16,depth=8,size=same",
        "ratio=1-4,window=16,depth=8,size=small",
    ]
    assert found[0].overrides == {
        "model.net.pattern": "gdn*8",
        "data.note": "gdn*8/8",
        "model.net.mixers.swa.window": 16,
        "model.net.width": 64,
        "model.optimizer": {"lr": 0.1},
    }
    assert found[5].overrides == {
        "model.net.pattern": "(swa(window=64) gdn*3)*2",
        "data.note": "(swa(window=64) gdn*3)*2/8",
        "model.net.mixers.swa.window": 64,
    }


def test_a_cell_is_compared_with_the_baselines_labels_and_its_own_others(tmp_path: Path) -> None:
    study = _study(tmp_path)
    found = cells(study)
    named = [None if (base := baseline_of(study, found, cell)) is None else base.name for cell in found]
    small, large = "ratio=1-4,window=16,depth=8,size=same", "ratio=1-4,window=64,depth=8,size=same"
    assert named == [small, small, small, small, large, large]
    study = _study(tmp_path, STUDY.replace("baseline: {ratio: 1/4, size: same}", 'baseline: {ratio: "0"}'))
    assert [baseline_of(study, found, cell) is None for cell in found] == [False] * 4 + [True] * 2


def test_runs_say_all_that_a_fit_needs(tmp_path: Path) -> None:
    study = _study(tmp_path)
    found = runs(study, cells(study))
    assert [run.seed for run in found] == [7] * 6 + [2] * 6
    assert len({run.folder for run in found}) == len({run.key for run in found}) == 12
    run = found[0]
    assert run.folder == Path("out/ratio/ratio=0,window=16,depth=8,size=small/seed_7")
    labels = {"ratio": "0", "window": "16", "depth": "8", "size": "small"}
    assert run.arguments == [
        *("fit", "--config", str(tmp_path / "base.yaml")),
        *("--model.net.pattern=gdn*8", "--data.note=gdn*8/8", "--model.net.mixers.swa.window=16"),
        *("--model.net.width=64", '--model.optimizer={"lr": 0.1}', "--seed_everything=7"),
        *("--run.root=out/ratio", f"--run.name={run.cell.name}", "--run.version=seed_7"),
        f"--run.labels={json.dumps(labels)}",
        "--run.metrics=[]",
    ]


def test_keys_depend_on_what_a_run_does_alone(tmp_path: Path) -> None:
    def keys(text: str, base: str = BASE) -> list[str]:
        study = _study(tmp_path, text, base)
        return [run.key for run in runs(study, cells(study))]

    first = keys(STUDY)
    assert keys(STUDY.replace("root: out", "root: other").replace("name: ratio", "name: n")) == first
    assert keys(STUDY, "# the same\n" + BASE) == first
    assert keys(STUDY.replace("small:", "tiny:")) == first
    assert not set(keys(STUDY, BASE.replace("lr: 1", "lr: 2"))) & set(first)
    assert not set(keys(STUDY.replace("model.net.pattern: swa,", "model.freeze: [head],"))) & set(first)
    changed = keys(STUDY.replace("seeds: [7, 2]", "seeds: [7, 3]"))
    assert changed[:6] == first[:6]
    assert not set(changed[6:]) & set(first)


SAME = [
    "{key: model.net.pattern, values: [gdn*2, gdn gdn]}",
    "{key: model.net.pattern, values: {a: gdn, b: gdn}}",
    "{values: {a: {}, b: {model.net.width: 32}}}",
    "{values: {a: {model.optimizer.lr: 2}, b: {model.optimizer: {lr: 2}}}}",
]


@pytest.mark.parametrize("axis", SAME)
def test_two_cells_that_are_the_same(axis: str, tmp_path: Path) -> None:
    study = _study(tmp_path, f"{{name: n, recipe: base.yaml, axes: {{x: {axis}}}}}")
    with pytest.raises(ConfigError, match=r"study\.yaml: axes: the cells x=.* and x=.* are the same, as both set"):
        cells(study)


def test_a_value_within_a_mapping_of_the_study_is_put_into_it(tmp_path: Path) -> None:
    text = """
name: n
recipe: base.yaml
overrides: {model.net.mixers: {swa: {heads: 2, window: 1}, gdn: {heads: 2}}}
axes: {window: {key: model.net.mixers.swa.window, values: [8]}}
"""
    (cell,) = cells(_study(tmp_path, text))
    assert cell.overrides == {"model.net.mixers": {"swa": {"heads": 2, "window": 8}, "gdn": {"heads": 2}}}


def test_recipes_are_joined_as_a_fit_joins_them() -> None:
    below = {
        "model": {"net": {"width": 1, "mixers": {"swa": {"heads": 2, "window": 4}, "gdn": {"heads": 2}}}},
        "a": [1],
    }
    above = {"model": {"net": {"pattern": "swa", "mixers": {"swa": {"heads": 3}}}}, "a": [2]}
    net = {"width": 1, "pattern": "swa", "mixers": {"swa": {"heads": 3}}}
    assert merged_recipe([below, above], {}) == {"model": {"net": net}, "a": [2]}
    option = merged_recipe([below], {"model.net.mixers.swa.window": 9})["model"]["net"]["mixers"]
    assert option == {"swa": {"heads": 2, "window": 9}, "gdn": {"heads": 2}}
    whole = merged_recipe([below], {"model.net.mixers": {"full": {}}})["model"]["net"]
    assert whole == {"width": 1, "mixers": {"full": {}}}
    net = merged_recipe([below], {"model.net": {"width": 5, "mixers": {"full": {}}, "vision": {}}})["model"]["net"]
    assert net == {"width": 5, "mixers": {"full": {}}, "vision": {}}
    assert merged_recipe([below], {"model.net": {"pattern": "swa"}})["model"]["net"] == {
        **below["model"]["net"],
        "pattern": "swa",
    }
    assert below["model"]["net"]["mixers"]["swa"]["window"] == 4


def test_runs_are_told_their_labels_and_the_metrics_of_the_study(tmp_path: Path) -> None:
    study = _study(tmp_path)
    with_metrics = _study(tmp_path, STUDY + "metrics: [test/b_exact]")
    (plain, *_), (told, *_) = (runs(one, cells(one)) for one in (study, with_metrics))
    assert '--run.metrics=["test/b_exact"]' in told.arguments
    assert any(word.startswith("--run.labels={") for word in told.arguments)
    assert "--run.metrics=[]" in plain.arguments
    assert told.key == plain.key  # what is shown changes nothing that a run does


labels = st.text(min_size=1, max_size=60).filter(lambda text: text.strip() and text.isprintable())


@given(st.lists(labels, min_size=2, max_size=6, unique_by=lambda text: text.casefold()))
def test_folders_differ_and_any_system_takes_them(texts: list[str]) -> None:
    names = [cell_name({"axis": text}) for text in texts]
    assert len({name.lower() for name in names}) == len(names)
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9._+=,~-]{1,120}", name)
        assert not name.endswith(".")
    assert [cell_name({"axis": text}) for text in reversed(texts)] == names[::-1]


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("1/4", "x=1-4"),
        ("gdn-only", "x=gdn-only"),
        ("0.001", "x=0.001"),
        ("swa+gdn", "x=swa+gdn"),
        ("(swa gdn*3)*2", r"x=swa_gdn_3_2~[0-9a-f]{6}"),
        ("swa gdn*3*2", r"x=swa_gdn_3_2~[0-9a-f]{6}"),
        ("1-4", r"x=1-4~[0-9a-f]{6}"),
        ("..", r"x=~[0-9a-f]{6}"),
    ],
)
def test_folders_can_be_read(label: str, name: str) -> None:
    assert re.fullmatch(name.replace("+", r"\+") if "~" not in name else name, cell_name({"x": label}))


def test_long_names_are_cut() -> None:
    names = {cell_name({f"axis{n}": "v" * 40 for n in range(5)} | {"last": str(k)}) for k in range(9)}
    assert {len(name) for name in names} == {120}
    assert len(names) == 9
