"""What ProgressFile writes beside a fit, whatever lies there, and that the fit does not need it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from hybridvl.layers.errors import ConfigError
from hybridvl.training.callbacks import progress_file
from hybridvl.training.callbacks.progress_file import ProgressFile
from hybridvl.training.trainer import run_folder


def test_progress_that_cannot_be_written_ends_no_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Path] = []

    def full(path: Path, content: object, durable: bool) -> None:
        tried.append(path)
        raise ConfigError(f"{path}: cannot be written: No space left on device")

    monkeypatch.setattr(progress_file, "write_json", full)
    trainer = tiny.trainer(tmp_path, 2, [ProgressFile()], validate=2)
    lines = run_folder(trainer) / "validations.jsonl"
    lines.mkdir(parents=True)  # which nothing can be added to
    trainer.fit(tiny.module(), datamodule=tiny.data())
    assert trainer.global_step == 2
    assert {path.name for path in tried} == {"progress.json"}
    assert lines.is_dir()


@pytest.mark.parametrize("left", [b"", b'{"step": 1}\n', b'{"step": 1}\n{"st'])
def test_every_validation_has_a_line_of_its_own(left: bytes, tmp_path: Path) -> None:
    """Whatever a process that was killed has left there."""
    trainer = tiny.trainer(tmp_path, 4, [ProgressFile()], validate=2)
    path = run_folder(trainer) / "validations.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(left)
    trainer.fit(tiny.module(), datamodule=tiny.data())
    content = path.read_bytes()
    assert content.startswith(left)
    assert content.endswith(b"\n")
    new = [json.loads(line) for line in content[len(left) :].splitlines() if line]
    assert [(line["step"], line["steps"]) for line in new] == [(2, 4), (4, 4)]
    last = {tag: float(value) for tag, value in trainer.callback_metrics.items() if tag.startswith("val/")}
    assert new[-1]["metrics"] == last
    assert "val/loss" in last
