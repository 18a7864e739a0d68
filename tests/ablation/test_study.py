"""The study file: what it means, and what is said about mistakes in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridvl.ablation.axes import Axis
from hybridvl.ablation.cells import cells
from hybridvl.ablation.keys import check_keys
from hybridvl.ablation.study import Match, read_study
from hybridvl.layers.errors import ConfigError

TEXT = """
name: ratio-${values.depth}
values: {depth: 8, blocks: 2, tags: [test/exact]}
recipe: [base.yaml, more.yaml]
overrides: {trainer.max_steps: 500, data.batch_size: "${values.depth}", run.test: "${model.net.tie_embeddings}"}
axes:
  ratio: {key: model.net.pattern, values: {0: "gdn*${values.depth}", 1/4: "(swa(window=${axes.window}) gdn*3)*2"}}
  window: {key: model.net.mixers.swa.window, values: [16, 64]}
  size: {values: {small: {model.net.width: 64, model.net.mlp_width: 128}, as is: {}}}
seeds: [0, 3]
exclude: [{ratio: 0, window: 64}]
baseline: {ratio: 1/4}
match: {budget: params, by: model.net.mlp_width, tolerance: 0.01}
metrics: ${values.tags}
"""
BASE = "model: {net: {pattern: swa gdn, width: 32, mlp_width: 16}}\ntrainer: {max_steps: 1}\n"


def _file(folder: Path, text: str = TEXT) -> Path:
    (folder / "base.yaml").write_text(BASE)
    (folder / "more.yaml").write_text("data: {max_tokens: 64, task: {class_path: hybridvl.data.digits.DigitPages}}\n")
    path = folder / "study.yaml"
    path.write_text(text)
    return path


def test_everything_is_read(tmp_path: Path) -> None:
    study = read_study(_file(tmp_path))
    assert (study.name, study.folder) == ("ratio-8", Path("runs/ratio-8"))
    assert study.recipes == (tmp_path / "base.yaml", tmp_path / "more.yaml")
    # What is the recipe's own stays for it.
    assert study.overrides == {
        "trainer.max_steps": 500,
        "data.batch_size": 8,
        "run.test": "${model.net.tie_embeddings}",
    }
    pattern = {"0": "gdn*8", "1/4": "(swa(window=${axes.window}) gdn*3)*2"}
    assert study.axes == (
        Axis("ratio", "model.net.pattern", pattern),
        Axis("window", "model.net.mixers.swa.window", {"16": 16, "64": 64}),
        Axis("size", None, {"small": {"model.net.width": 64, "model.net.mlp_width": 128}, "as is": {}}),
    )
    assert study.seeds == (0, 3)
    assert study.exclude == ({"ratio": "0", "window": "64"},)
    assert study.baseline == {"ratio": "1/4"}
    assert study.matches == (Match("params", ("model.net.mlp_width",), None, 0.01, 1),)
    assert study.metrics == ("test/exact",)


def test_little_is_enough(tmp_path: Path) -> None:
    study = read_study(_file(tmp_path, "{name: n, recipe: base.yaml}"))
    assert (study.axes, study.seeds, study.matches, study.baseline) == ((), (0,), (), {})
    assert [cell.name for cell in cells(study)] == ["all"]
    study = read_study(
        _file(tmp_path, "{name: n, recipe: base.yaml, axes: {lr: {key: model.optimizer.lr, values: [1e-3]}}}")
    )
    assert study.baseline == {"lr": "0.001"}  # the first of each axis


def test_every_part_can_be_changed(tmp_path: Path) -> None:
    changes = {
        "name": "other",
        "root": "elsewhere",
        "values.depth": "4",
        "overrides.trainer.max_steps": "7",
        "overrides.model.optimizer.lr": "0.5",
        "axes.window.values": "[8, 16, 64]",
        "axes.window.key": "model.net.mixers.wide.window",
        "match.tolerance": "0.2",
        "seeds": "[5]",
        "exclude": "[]",
        "baseline": "{ratio: '0', window: 8}",
        "metrics": "[val/loss]",
        "recipe": "base.yaml",
    }
    study = read_study(_file(tmp_path), changes)
    assert study.folder == Path("elsewhere/other")
    assert study.overrides["data.batch_size"] == 4
    assert study.axes[0].values["0"] == "gdn*4"
    assert (study.overrides["trainer.max_steps"], study.overrides["model.optimizer.lr"]) == (7, 0.5)
    assert study.axes[1] == Axis("window", "model.net.mixers.wide.window", {"8": 8, "16": 16, "64": 64})
    assert (study.matches[0].tolerance, study.matches[0].budget) == (0.2, "params")
    assert (study.seeds, study.exclude, study.metrics) == ((5,), (), ("val/loss",))
    assert study.baseline == {"ratio": "0", "window": "8"}
    assert study.recipes == (tmp_path / "base.yaml",)


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("none", ()),
        ("flops", (Match("flops"),)),
        ("{budget: none}", ()),
        ("{budget: state_bytes, by: [a.b, a.c], context: 9}", (Match("state_bytes", ("a.b", "a.c"), 9),)),
        (
            "[{budget: state_bytes, by: a.b, multiple_of: 16}, params]",
            (Match("state_bytes", ("a.b",), multiple_of=16), Match("params")),
        ),
    ],
)
def test_what_is_matched(text: str, matches: tuple[Match, ...], tmp_path: Path) -> None:
    assert read_study(_file(tmp_path), {"match": text}).matches == matches


MISTAKES = [
    ("axis: {}", r"axis: unknown key, did you mean 'axes'\?"),
    ("name: a/b", r"name: 'a/b'; expected one folder name"),
    ("root: 3", r"root: 3; expected the name of a folder"),
    ("recipe: gone.yaml", r"recipe: .*gone\.yaml: cannot be read: No such file"),
    ("recipe: []", r"recipe: \[\]; expected the name of a recipe beside the study, or several"),
    ("values: {x: '${values.y}'}", r"values\.x: .*values\.y"),
    ("overrides: [1]", r"overrides: \[1\]; expected a mapping of paths to values"),
    ("overrides: {run.name: x}", r"overrides\.run\.name: 'x'; the study says this itself"),
    ("overrides: {seed_everything: 1}", r"overrides\.seed_everything: 1; the study says this itself"),
    ("overrides: {a.b: '${values.no}'}", r"overrides\.a\.b: \$\{values\.no\} is not among the values; known are none"),
    (
        "overrides: {a.b: '${axes.no}'}",
        r"overrides\.a\.b: \$\{axes\.no\}: no such axis; known are \$\{axes\.a\}, \$\{axes\.b\}",
    ),
    ("overrides: {model: {net: 1}}", r"overrides\.model: \{'net': 1\}; expected paths, such as model\.net"),
    ("axes: [1]", r"axes: \[1\]; expected a mapping of names to \{key, values\}"),
    ("axes: {a: [1, 2]}", r"axes\.a: \[1, 2\]; expected a mapping of key and values"),
    ("axes: {a: {key: x.y, valeus: [1]}}", r"axes\.a\.valeus: unknown key, did you mean 'values'\?"),
    ("axes: {a: {key: x.y}}", r"axes\.a\.values: missing; expected a list of values, or a mapping of labels"),
    ("axes: {a: {key: x.y, values: []}}", r"axes\.a\.values: \[\]; an axis needs at least one value"),
    ("axes: {a: {key: x.y, values: {}}}", r"axes\.a\.values: \{\}; an axis needs at least one value"),
    ("axes: {a: {key: x.y, values: 3}}", r"axes\.a\.values: 3; expected a list of values"),
    ("axes: {a: {key: x..y, values: [1]}}", r"axes\.a\.key: 'x\.\.y': expected the path of a recipe's value"),
    ("axes: {a: {key: run.version, values: [1]}}", r"axes\.a\.key: 'run\.version': .*; the study says this itself"),
    ("axes: {a b: {key: x.y, values: [1]}}", r"axes: 'a b'; expected a name of letters"),
    ("axes: {a: {key: x.y, values: [1, 2, '1']}}", r"axes\.a\.values: '1' given twice; expected labels that differ"),
    ("axes: {a: {key: x.y, values: [ab, aB]}}", r"axes\.a\.values: 'aB' differs from 'ab' by case alone"),
    ("axes: {a: {key: x.y, values: {'': 1}}}", r"axes\.a\.values: ''; expected a label that can be read"),
    ("axes: {a: {key: x.y, values: [[1], [2]]}}", r"axes\.a\.values: \[1\] has no label; expected a mapping of labels"),
    (
        "axes: {a: {values: [1, 2]}}",
        r"axes\.a\.values\.1: 1; expected a mapping of paths to values, as the axis has no key",
    ),
    ("axes: {a: {values: {x: {b: 1}, y: 3}}}", r"axes\.a\.values\.y: 3; expected a mapping of paths to values"),
    ("axes: {a: {values: {x: {b c: 1}}}}", r"axes\.a\.values\.x\.b c: expected the path of a recipe's value"),
    (
        "axes: {a: {key: x.y, values: {p: '${axes.b}'}}, b: {key: x.z, values: {q: '${axes.a}'}}}",
        r"axes: a, b: their values refer to each other in a circle",
    ),
    (
        "axes: {a: {key: x.y, values: {p: 1}}, b: {values: {q: {x.y: 1}}}}",
        r"axes\.b: sets x\.y, which axis 'a' sets too; expected one axis",
    ),
    ("seeds: 3", r"seeds: 3; expected a list of whole numbers"),
    ("seeds: []", r"seeds: \[\]; expected a list of whole numbers"),
    ("seeds: [0, -1]", r"seeds: -1; expected a list of whole numbers"),
    ("seeds: [0, true]", r"seeds: True; expected a list of whole numbers"),
    ("seeds: [0, 1, 0]", r"seeds: 0 is given 2 times; expected each once"),
    ("exclude: {a: 1}", r"exclude: \{'a': 1\}; expected a list of mappings of axes to labels"),
    ("exclude: [{}]", r"exclude\[0\]: \{\}; expected the label of at least one axis"),
    ("exclude: [{a: 1}, {c: 1}]", r"exclude\[1\]\.c: unknown key; known here are a, b"),
    ("exclude: [{a: 3}]", r"exclude\[0\]\.a: '3' is no label of the axis; its labels are '1', '2'"),
    ("exclude: [{a: 1}, {a: 2}]", r"exclude: leaves no cell of 4; expected at least one"),
    ("baseline: {a: x}", r"baseline\.a: 'x' is no label of the axis; its labels are '1', '2'"),
    ("match: tokens", r"match\.budget: 'tokens'; expected one of params, flops, state_bytes, none"),
    ("match: {budget: params, bye: x.y}", r"match\.bye: unknown key, did you mean 'by'\?"),
    ("match: state_bytes", r"match\.by: missing; a state does not depend on the MLPs"),
    ("match: {budget: params, tolerance: 2}", r"match\.tolerance: 2; expected a share between 0 and 1"),
    ("match: {budget: params, multiple_of: 0}", r"match\.multiple_of: 0; expected a whole number of at least 1"),
    ("match: [params, params]", r"match\[1\]\.budget: 'params' is matched already; expected each budget once"),
    ("metrics: test/exact", r"metrics: 'test/exact'; expected a list of tags"),
]
GOOD = {
    "name": "name: n\n",
    "recipe": "recipe: base.yaml\n",
    "axes": "axes: {a: {key: x.y, values: [1, 2]}, b: {key: x.z, values: [1, 2]}}\n",
}


@pytest.mark.parametrize(("text", "message"), MISTAKES)
def test_mistakes_are_named(text: str, message: str, tmp_path: Path) -> None:
    given = text.partition(":")[0]
    path = _file(tmp_path, text + "\n" + "".join(line for key, line in GOOD.items() if key != given))
    with pytest.raises(ConfigError, match=rf"^{path}: {message}"):
        read_study(path)


def test_a_baseline_that_is_excluded(tmp_path: Path) -> None:
    path = _file(tmp_path, "exclude: [{a: 1}]\nbaseline: {a: 1}\n" + "".join(GOOD.values()))
    with pytest.raises(ConfigError, match=rf"^{path}: baseline: \{{a: 1\}} is excluded"):
        read_study(path)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("values.dept", r"values\.dept: unknown key, did you mean 'depth'\?"),
        ("axes.rati.values", r"axes\.rati: unknown key, did you mean 'ratio'\?"),
        ("axes.ratio.value", r"axes\.ratio\.value: unknown key, did you mean 'values'\?"),
        ("match.bugdet", r"match\.bugdet: unknown key, did you mean 'budget'\?"),
        ("model.net.width", r"model\.net\.width: expected name, root, recipe, values\.NAME, overrides\.PATH"),
    ],
)
def test_changes_of_what_is_not_there(key: str, message: str, tmp_path: Path) -> None:
    path = _file(tmp_path)
    with pytest.raises(ConfigError, match=rf"^{path}: {message}"):
        read_study(path, {key: "1"})


KNOWN = {
    "model.net.pattern",
    "model.net.width",
    "model.net.mixers",
    "data.task",
    "data.batch_size",
    "trainer.max_steps",
    "x",
}
KNOWN |= {"model", "model.net", "data", "trainer"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "axes: {a: {key: model.net.patern, values: [1]}}",
            r"axes\.a\.key: 'model\.net\.patern' is no key of the recipe, did you mean 'model\.net\.pattern'\?",
        ),
        ("axes: {a: {key: pattern, values: [1]}}", r"did you mean 'model\.net\.pattern'\?"),
        ("axes: {a: {key: model.net.width.x, values: [1]}}", None),
        ("axes: {a: {key: model.net.mixers.swa.window, values: [1]}}", None),
        (
            "axes: {a: {values: {l: {data.batchsize: 1}}}}",
            r"axes\.a\.values\.l: 'data\.batchsize' .*'data\.batch_size'\?",
        ),
        ("axes: {a: {key: data.task.init_args.row, values: [1]}}", r"did you mean 'data\.task\.init_args\.rows'\?"),
        ("axes: {a: {key: data.task.rows, values: [1]}}", r"did you mean 'data\.task\.init_args\.rows'\?"),
        ("axes: {a: {key: data.task.init_args.rows, values: [1]}}", None),
        ("overrides: {trainer.maxsteps: 1}", r"overrides: 'trainer\.maxsteps' .*'trainer\.max_steps'\?"),
        ("match: {budget: params, by: model.net.widht}", r"match\.by: 'model\.net\.widht' .*'model\.net\.width'\?"),
        ("overrides: {optimizer.zzz: 1}", r"'optimizer\.zzz' is no key of the recipe; expected a path"),
    ],
)
def test_keys_that_the_recipe_does_not_have(text: str, message: str | None, tmp_path: Path) -> None:
    path = _file(tmp_path, f"name: n\nrecipe: [base.yaml, more.yaml]\n{text}\n")
    study = read_study(path)
    if message is None:
        check_keys(study, KNOWN)
        return
    with pytest.raises(ConfigError, match=rf"^{path}: .*{message}"):
        check_keys(study, KNOWN)
