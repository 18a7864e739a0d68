"""docs/distillation.md: its recipes and pipelines are accepted, its commands have the flags that they use."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hybridvl.cli import main
from hybridvl.cli import pipeline as cli
from hybridvl.models.config import ModelConfig, VisionConfig
from hybridvl.models.vlm import VisionLanguageModel
from hybridvl.pipeline.description import read_pipeline
from hybridvl.training.freezing import select_parameters

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "distillation.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
YAML = [yaml.safe_load(text) for kind, text in BLOCKS if kind == "yaml"]
COMMANDS = [
    shlex.split(line, comments=True)
    for kind, text in BLOCKS
    for line in text.splitlines()
    if kind == "bash" and line.startswith("hybridvl ")
]


def _stages() -> list[dict[str, Any]]:
    return [block for block in YAML if "model" in block]


def test_the_blocks_are_found() -> None:
    assert [block.get("run", {}).get("stage") for block in _stages()] == ["layers", "logits", None, None]
    assert len(COMMANDS) == 6


@pytest.mark.parametrize("block", _stages(), ids=lambda block: block.get("run", {}).get("stage", "supervised"))
def test_the_settings_of_a_stage_exist(
    block: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    if "source" in block["model"]:
        block = {**block, "model": {**block["model"], "net": {"pattern": "full"}}}
    recipe.write_text(yaml.safe_dump({**block, "trainer": {"max_steps": 1}}))
    assert main(["fit", "--config", str(recipe), "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)["model"]
    parts = ("student", "net", "lora")
    assert {key: printed[key] for key in block["model"] if key not in parts} == {
        key: value for key, value in block["model"].items() if key not in parts
    }
    for part in ("student", "lora"):
        assert block["model"].get(part, {}).items() <= (printed.get(part) or {}).items()


def test_the_pipeline(tmp_path: Path) -> None:
    (block,) = [block for block in YAML if "stages" in block]
    for name in ("data.yaml", "teacher.yaml", "layers.yaml"):
        shutil.copy(ROOT / "recipes" / "tiny" / name, tmp_path)
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(block, sort_keys=False))
    pipeline = read_pipeline(tmp_path / "pipeline.yaml")
    assert [stage.needs for stage in pipeline.stages] == [(), ("teacher",)]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[3:]) or "plain")
def test_a_command(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cli, "_check", lambda step, arguments: None)  # tests/recipes has every stage checked
    flags = [word for word in command[3:] if word != "--dry-run"]
    assert main([*command[1:3], *flags, "--dry-run", "--root", str(tmp_path)]) == 0
    assert capfd.readouterr().out.count("to run") == 4


def test_the_names_of_parts_exist() -> None:
    (line,) = [text for text in re.split(r"\n\n", PAGE) if text.startswith("`freeze` and `train_only` take")]
    names = [name for name in re.findall(r"`([\w:,-]+)`", line) if name not in ("freeze", "train_only")]
    assert {"vision", "head", "mixers:new", "layers:0-3,7"} <= set(names)
    vision = VisionConfig(depth=1, width=32, heads=2, mlp_width=32, full_attention_blocks=(0,))
    with torch.device("meta"):
        net = VisionLanguageModel(ModelConfig(pattern="full*8", width=64, mlp_width=64, vision=vision))
    assert all(select_parameters(net, name, replaced=[1]) for name in names)
