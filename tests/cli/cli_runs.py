"""The command line in this process, and a recipe that trains in a second."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from tiny_net import NET

RECIPE = {
    "seed_everything": 5,
    "model": {
        "net": NET,
        "optimizer": {"lr": 0.003, "warmup_steps": 2},
        "reply_tokens": 6,
    },
    "data": {
        "task": {
            "class_path": "hybridvl.data.digits.DigitPages",
            "init_args": {
                "rows": [1, 2],
                "columns": [1, 2],
                "cell": 8,
                "turns": 2,
                "train_pages": 20,
                "val_pages": 4,
                "test_pages": 4,
            },
        },
        "batch_size": 4,
        "max_tokens": 256,
        "system": None,
        "images": {
            "patch_size": "${model.net.vision.patch_size}",
            "temporal_patch_size": "${model.net.vision.temporal_patch_size}",
            "mean": [0.5],
            "std": [0.5],
        },
    },
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 12,
        "log_every_n_steps": 1,
        "check_val_every_n_epoch": None,
        "val_check_interval": 6,
    },
    "checkpoints": {"every_n_steps": 4},
    "examples": {"count": 2},
}


def recipe(folder: Path, name: str = "tiny", text: str = "") -> Path:
    """A recipe file whose runs lie in folder/runs/NAME; `text` is YAML that is merged into it."""
    run = {"root": str(folder / "runs"), "name": name}
    content = _merged({**RECIPE, "run": run}, yaml.safe_load(text) or {})
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def hybridvl(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The installed command, which Lightning starts once more for the second process."""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.run(
        [Path(sys.executable).parent / "hybridvl", *arguments],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=200,
    )


def stage_recipe(folder: Path, stage: str, model: dict[str, Any], name: str | None = None, text: str = "") -> Path:
    """The tiny recipe with another stage and its model's settings, and numbers in place of references to model.net."""
    name = name or stage
    content = yaml.safe_load(recipe(folder, name, text).read_text())
    content["model"] = {"optimizer": content["model"]["optimizer"], "reply_tokens": 6, **model}
    content["data"]["images"] |= {"patch_size": 4, "temporal_patch_size": 1}
    content["run"] |= {"stage": stage}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def differences(left: Any, right: Any, place: str = "") -> list[str]:
    """Where two checkpoints differ, down to the last bit."""
    if isinstance(left, torch.Tensor):
        return [] if torch.equal(left, right) else [place]
    if isinstance(left, dict):
        if left.keys() != right.keys():
            return [f"{place}: keys"]
        return [found for key in left for found in differences(left[key], right[key], f"{place}/{key}")]
    if isinstance(left, list | tuple):
        pairs = enumerate(zip(left, right, strict=True))
        return [found for index, (a, b) in pairs for found in differences(a, b, f"{place}/{index}")]
    return [] if left == right else [f"{place}: {left!r} {right!r}"]


def _merged(base: dict, extra: dict) -> dict:
    nested = {key: _merged(base[key], extra[key]) for key in extra if isinstance(base.get(key), dict) and extra[key]}
    return {**base, **extra, **nested}
