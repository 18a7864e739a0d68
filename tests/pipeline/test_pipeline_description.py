"""The pipeline file: what it means, and what is said about mistakes in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridvl.layers.errors import ConfigError
from hybridvl.pipeline.description import read_pipeline
from hybridvl.pipeline.references import filled

TEXT = """
name: tiny-${values.seed}
values: {seed: 3, student: {pattern: full*2, layers: [0, 1]}}
stages:
  teacher:
    recipe: teacher.yaml
    overrides: {seed_everything: "${values.seed}", run.test: false}
  layers:
    recipe: [teacher.yaml, student.yaml]
    overrides:
      model.student.teacher: ${stages.teacher.model}
      model.student.pattern: ${values.student.pattern}
      model.freeze: ["layers:${values.seed}", vision]
      data.images.patch_size: ${model.net.vision.patch_size}
      data.task: {class_path: Task, init_args: {folder: "${stages.teacher.folder}/pages", of: "${values.student}"}}
"""


def _file(folder: Path, text: str = TEXT) -> Path:
    for name in ("teacher.yaml", "student.yaml"):
        (folder / name).write_text("run: {threads: 1}\n")
    path = folder / "pipeline.yaml"
    path.write_text(text)
    return path


def test_values_and_names_are_put_in_and_what_is_the_recipes_stays(tmp_path: Path) -> None:
    pipeline = read_pipeline(_file(tmp_path))
    assert (pipeline.name, pipeline.root, pipeline.folder) == ("tiny-3", Path("runs"), Path("runs/tiny-3"))
    teacher, layers = pipeline.stages
    assert (teacher.name, teacher.recipes, teacher.needs) == ("teacher", (tmp_path / "teacher.yaml",), ())
    assert teacher.overrides == {"seed_everything": 3, "run.test": False}
    assert (layers.recipes, layers.needs) == ((tmp_path / "teacher.yaml", tmp_path / "student.yaml"), ("teacher",))
    student = {"pattern": "full*2", "layers": [0, 1]}
    assert layers.overrides == {
        "model.student.teacher": "${stages.teacher.model}",
        "model.student.pattern": "full*2",
        "model.freeze": ["layers:3", "vision"],
        "data.images.patch_size": "${model.net.vision.patch_size}",
        "data.task": {"class_path": "Task", "init_args": {"folder": "${stages.teacher.folder}/pages", "of": student}},
    }
    results = {"stages.teacher.model": "A/model", "stages.teacher.folder": "A"}
    again = filled(layers.overrides, results)
    assert again["model.student.teacher"] == "A/model"
    assert again["data.task"]["init_args"]["folder"] == "A/pages"


def test_every_value_can_be_changed_by_its_path(tmp_path: Path) -> None:
    changes = {
        "root": "elsewhere",
        "values.seed": "7",
        "values.student.pattern": "(swa gdn)",
        "stages.teacher.overrides.trainer.max_steps": "5",
        "stages.layers.overrides.model.freeze": "[head]",
        "stages.layers.recipe": "student.yaml",
    }
    pipeline = read_pipeline(_file(tmp_path), changes)
    teacher, layers = pipeline.stages
    assert pipeline.folder == Path("elsewhere/tiny-7")
    assert teacher.overrides == {"seed_everything": 7, "run.test": False, "trainer.max_steps": 5}
    assert layers.overrides["model.student.pattern"] == "(swa gdn)"
    assert layers.overrides["model.freeze"] == ["head"]
    assert layers.recipes == (tmp_path / "student.yaml",)


MISTAKES = [
    ("nme: x", r"nme: unknown key, did you mean 'name'\?"),
    ("name: a/b", r"name: 'a/b'; expected one folder name"),
    ("name: ..", r"name: '\.\.'; expected one folder name"),
    ("name: 3", r"name: 3; expected the name of a folder"),
    ("root: []", r"root: \[\]; expected the name of a folder"),
    ("stages: []", r"stages: \[\]; expected a mapping of stage names to \{recipe, overrides\}"),
    ("stages: {}", r"stages: none; expected at least one"),
    ("stages: {a: {recpe: teacher.yaml}}", r"stages\.a\.recpe: unknown key, did you mean 'recipe'\?"),
    ("stages: {a: teacher.yaml}", r"stages\.a: 'teacher\.yaml'; expected a mapping of recipe and overrides"),
    ("stages: {a.b: {recipe: teacher.yaml}}", r"stages: 'a\.b'; expected a name of letters"),
    ("stages: {a: {}}", r"stages\.a\.recipe: None; expected the name of a recipe"),
    ("stages: {a: {recipe: []}}", r"stages\.a\.recipe: \[\]; expected the name of a recipe"),
    ("stages: {a: {recipe: gone.yaml}}", r"stages\.a\.recipe: .*gone\.yaml: cannot be read: No such file"),
    ("stages: {a: {recipe: list.yaml}}", r"stages\.a\.recipe: .*list\.yaml: \[1, 2\]; expected a mapping"),
    ("stages: {a: {recipe: bad.yaml}}", r"stages\.a\.recipe: .*bad\.yaml: .*; expected YAML"),
    ("stages: {a: {recipe: teacher.yaml, overrides: [x]}}", r"stages\.a\.overrides: \['x'\]; expected a mapping"),
    ("values: [1]", r"values: \[1\]; expected a mapping of names to values"),
    ("values: {x: '${values.y}'}", r"values\.x: .*values\.y"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES)
def test_mistakes_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("[1, 2]")
    (tmp_path / "bad.yaml").write_text("a: {b: ]")
    good = {"name": "name: n\n", "stages": "stages: {a: {recipe: teacher.yaml}}\n"}
    given = text.partition(":")[0]
    path = _file(tmp_path, text + "\n" + "".join(line for key, line in good.items() if key != given))
    with pytest.raises(ConfigError, match=rf"^{path}: {message}"):
        read_pipeline(path)


OVERRIDES = [
    (
        "model.source: ${stages.gone.model}",
        r"\$\{stages\.gone\.model\}: 'gone' is no stage; expected an earlier stage: a",
    ),
    ("model.source: ${stages.c.model}", r"'c' comes later; expected an earlier stage: a$"),
    (
        "model.source: ${stages.b.model}",
        r"\$\{stages\.b\.model\} refers to the stage itself; expected an earlier stage: a",
    ),
    ("model.source: ${stages.a.modle}", r"expected \$\{stages\.a\.model\} or \$\{stages\.a\.folder\}"),
    ("model.freeze: ['x${stages.c.model}']", r"'c' comes later"),
    ("data.task: {init_args: {path: '${stages.c.model}'}}", r"'c' comes later"),
    ("data.seed: ${values.sed}", r"\$\{values\.sed\} is not among the values; known are \$\{values\.seed\}"),
    ("run.version: x", r"'x'; the pipeline says this itself"),
    ("ckpt_path: last", r"'last'; the pipeline says this itself"),
    ("model: {freeze: [vision]}", r"expected paths, such as model\.freeze"),
    ("--model.lr: 3", r"expected the path of a recipe's value, such as model\.optimizer\.lr"),
]


@pytest.mark.parametrize(("override", "message"), OVERRIDES)
def test_mistakes_in_overrides_are_named(override: str, message: str, tmp_path: Path) -> None:
    text = "name: n\nvalues: {seed: 1}\nstages:\n"
    for name in "abc":
        text += f"  {name}:\n    recipe: teacher.yaml\n"
        if name == "b":
            text += f"    overrides:\n      {override}\n"
    path = _file(tmp_path, text)
    key = override.partition(": ")[0]
    with pytest.raises(ConfigError, match=rf"^{path}: stages\.b\.overrides\.{key}: .*{message}"):
        read_pipeline(path)


def test_two_stages_of_one_name(tmp_path: Path) -> None:
    path = _file(tmp_path, "name: n\nstages: {a: {recipe: teacher.yaml}, a: {recipe: teacher.yaml}}")
    with pytest.raises(ConfigError, match=r"found duplicate key a.*; expected YAML"):
        read_pipeline(path)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("values.sed", r"values\.sed: unknown key, did you mean 'seed'\?"),
        ("values.student.deep.er", r"values\.deep: unknown key"),
        ("values.seed.more", r"values\.seed\.more: 3; expected a mapping"),
        ("stages.layer.recipe", r"stages\.layer: unknown key, did you mean 'layers'\?"),
        ("stages.layers.model.lr", r"expected name, root, values\.NAME, stages\.STAGE\.recipe"),
    ],
)
def test_changes_of_what_is_not_there_are_refused(key: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read_pipeline(_file(tmp_path), {key: "1"})
