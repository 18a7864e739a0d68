"""`hybridvl plan`: recipes, files it writes, and what it says about mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import hybridvl
from hybridvl.cli import main
from hybridvl.models.config import ModelConfig
from hybridvl.models.vlm import VisionLanguageModel

ROOT = Path(__file__).parents[2]

RECIPE = """
depth: 2
model:
  net:
    pattern: (swa gdn)*${depth}
    width: 64
    mlp_width: 96
    vocab_size: 50
    norm_eps: 1e-6
    mixers:
      swa: {heads: 4, kv_heads: 2, head_dim: 16, window: 24}
      gdn: {heads: 2, head_dim: 16}
data:
  broken: ${no.such.key}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_the_defaults_are_infinitevl(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "(swa gdn*3)*9", "full*36", "--context", "8192"]) == 0
    shown = capsys.readouterr().out
    assert "4,408,381,536" in shown
    assert "3,754,622,976 (0.85x)" in shown
    assert main(["plan"]) == 0
    assert "4,408,381,536" in capsys.readouterr().out


def test_files(tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written, drawn = tmp_path / "out" / "plan.json", tmp_path / "out" / "plan.png"
    files = ["--json", str(written), "--png", str(drawn)]
    assert main(["plan", "swa*2", "gdn", "--config", str(recipe), "--dtype", "float32", *files]) == 0
    capsys.readouterr()
    plans = json.loads(written.read_text())
    assert [plan["pattern"] for plan in plans] == ["swa*2", "gdn"]
    assert plans[0]["dtype"] == "float32"
    # 24 slots of keys and values of 2 heads of 16 floats and a length, twice; the model's length and rotary delta.
    assert plans[0]["state_bytes"]["1024"] == 2 * (24 * 2 * 2 * 16 * 4 + 8) + 16
    assert drawn.read_bytes().startswith(b"\x89PNG")


def test_a_recipe(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", str(recipe), "--json", "-"]) == 0
    [plan] = json.loads(capsys.readouterr().out)
    assert plan["pattern"] == "(swa gdn)*2"
    assert [layer["mixer"] for layer in plan["layers"]] == ["swa", "gdn"] * 2
    assert plan["params"]["embeddings"] == 50 * 64


def test_the_folder_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig(pattern="gdn*2", mixers={"gdn": {"heads": 2, "head_dim": 16}}, width=64, vocab_size=50)
    model = VisionLanguageModel(config)
    hybridvl.save(model, str(tmp_path))
    assert main(["plan", "--config", str(tmp_path), "--json", "-"]) == 0
    [plan] = json.loads(capsys.readouterr().out)
    assert plan["pattern"] == "gdn*2"
    assert plan["params"]["total"] == model.num_params


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_the_shipped_recipes(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", str(path), "--layers"]) == 0
    assert "params, total" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["(swa gdm*3)*9"], "error: layer pattern, column 6: unknown mixer 'gdm', did you mean 'gdn'?"),
        (["gdn*1000000000"], "expected at most 4096 layers"),
        (["swa(window=0)"], "swa.window = 0: expected an integer of at least 1"),
        (["full", "--context", "0"], "context: 0; expected at least 1 token"),
        (["full", "--config", "no/such.yaml"], "no/such.yaml"),
        (["full", "--png", "."], ".: is a folder; expected the name of a file to write"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("window: 24", "window: -1", "model.net.mixers.swa.window = -1: expected an integer of at least 1"),
        ("window: 24", "windo: 24", "model.net.mixers.swa.windo: unknown option, did you mean 'window'?"),
        ("width: 64", "with: 64", "model.net: unknown key 'with'"),
        ("${depth}", "${deep}", "Interpolation key 'deep' not found"),
        ("  net:", "  nets:", "no model.net; expected the sizes of a model there"),
        ("    width: 64", "  width: 64", "expected a recipe in YAML"),
    ],
)
def test_mistakes_in_a_recipe(
    old: str, new: str, message: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.write_text(RECIPE.replace(old, new))
    assert main(["plan", "--config", str(recipe)]) == 2
    assert message in capsys.readouterr().err


def test_help_lists_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--help"]) == 0
    shown = capsys.readouterr().out
    for option in ("PATTERN", "--config", "--context", "--dtype", "--layers", "--json", "--png"):
        assert option in shown
