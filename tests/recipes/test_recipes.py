"""Every recipe is parsed by the command line, built without memory, and agrees with its data."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipe_builds import build

from hybridvl.training.agreement import check_agreement

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
PATTERNS = ["full*4", "swa*4", "mamba2*4", "(swa gdn*3)", "(swa+mamba2)*4"]


def test_there_are_recipes() -> None:
    assert {recipe.name for recipe in RECIPES} >= {"digits.yaml", "easy_vqa.yaml"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_builds_on_the_meta_device(recipe: Path) -> None:
    if recipe.stem == "easy_vqa":
        pytest.importorskip("easy_vqa")
    built = build("--config", str(recipe))
    net = built.model.net
    assert {parameter.device.type for parameter in net.parameters()} == {"meta"}
    check_agreement(built.model.config, built.datamodule)
    assert built.trainer.max_steps > 0
    assert built.config.fit.run.name == recipe.stem


@pytest.mark.parametrize("pattern", PATTERNS)
def test_digits_builds_with_nothing_changed_but_the_pattern(pattern: str) -> None:
    digits = next(recipe for recipe in RECIPES if recipe.stem == "digits")
    net = build("--config", str(digits), "--model.net.pattern", pattern).model.net
    assert len(net.mixer_configs) == 4
    named = {config.name or "+".join(branch.name for branch in config.branches) for config in net.mixer_configs}
    assert (
        named
        == {
            "full*4": {"full"},
            "swa*4": {"swa"},
            "mamba2*4": {"mamba2"},
            "(swa gdn*3)": {"swa", "gdn"},
            "(swa+mamba2)*4": {"swa+mamba2"},
        }[pattern]
    )
