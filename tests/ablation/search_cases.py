"""Studies with a search for tests, and a program that stands for `hybridvl fit` in them and takes a moment."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from tiny_net import NET

from hybridvl.ablation import local
from hybridvl.ablation.study import Study, read_study

STUDY = """
name: n
root: ROOT
recipe: base.yaml
axes:
  lr: {key: model.optimizer.lr, range: {low: 1.0e-4, high: 1.0e-2, log: true}}
  width: {key: model.net.mlp_width, range: {low: 32, high: 128, step: 16}}
  mixer: {key: model.net.pattern, values: {both: swa gdn, window: swa*2, gdn: gdn*2}}
search: {trials: 6, metric: val/loss, direction: min}
"""
STEPS = (10, 20, 30, 40)
# The loss is the distance to lr 0.001, and falls. With a file "broken" here, large rates fail.
FIT = """#!PYTHON -SE
import json, math, os, sys, time
words = dict(word[2:].split("=", 1) for word in sys.argv[1:] if word.startswith("--") and "=" in word)
lr, seed = float(words["model.optimizer.lr"]), int(words["seed_everything"])
folder = os.path.join(words["run.root"], words["run.name"], words["run.version"])
last = os.path.join(folder, "checkpoints", "last.ckpt")
done = int(open(last).read()) if "ckpt_path" in words else 0
os.makedirs(os.path.dirname(last), exist_ok=True)
if os.path.exists("broken") and lr > 0.002:
    sys.exit("error: the loss is no number")
for step in STEPS:
    loss = abs(math.log10(lr) + 3) + 10 / step + seed / 100
    if step > done:
        time.sleep(float(os.environ.get("SLOW", "0.03")))
        with open(os.path.join(folder, "validations.jsonl"), "a") as file:
            file.write(json.dumps({"step": step, "steps": STEPS[-1], "metrics": {"val/loss": loss}}) + chr(10))
        with open(last + ".new", "w") as file:
            file.write(str(step))
        os.replace(last + ".new", last)
with open(os.path.join(folder, "metrics.json.new"), "w") as file:
    json.dump({"metrics": {"val/loss": loss}, "ended": "2026-01-01T00:00:00+00:00"}, file)
os.replace(file.name, os.path.join(folder, "metrics.json"))
print("through", flush=True)
"""


def study_of(folder: Path, text: str = STUDY, changes: dict[str, str] | None = None) -> Study:
    """The study that a text describes, beside a small recipe."""
    (folder / "base.yaml").write_text(yaml.safe_dump({"model": {"net": NET}}))
    (folder / "study.yaml").write_text(text.replace("ROOT", str(folder / "runs")))
    return read_study(folder / "study.yaml", changes or {})


def loss(lr: str, step: int = 40, seed: int = 0) -> float:
    """What a run comes to."""
    return abs(math.log10(float(lr)) + 3) + 10 / step + seed / 100


def use_quick_fits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let engines start the program above in place of Python, in a folder."""
    program = folder / "fit"
    program.write_text(FIT.replace("PYTHON", sys.executable).replace("STEPS", repr(STEPS)))
    program.chmod(0o755)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(local, "sys", SimpleNamespace(executable=str(program)))
