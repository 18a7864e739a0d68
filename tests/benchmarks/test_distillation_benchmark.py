"""benchmarks/distillation.py: the pipelines of its cells, and its table worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scripts import load_script

from hybridvl.pipeline.records import StageRun
from hybridvl.pipeline.runner import plan_steps


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("distillation")


def _stage(exact: float, tokens: int = 100) -> dict[str, Any]:
    return {"metrics": {"test/exact": exact}, "tokens": tokens}


def test_students_of_one_seed_share_their_teacher_and_every_step_its_samples(
    script: ModuleType, tmp_path: Path
) -> None:
    first, second = (script.cell(tmp_path, pattern, "none", 4, 1) for pattern in ("gdn*8", "mamba2*8"))
    assert first.folder == second.folder == tmp_path / "seed-4"
    assert first.stages[0] == second.stages[0]
    assert first.stages[1] != second.stages[1]
    assert first.stages[1].overrides["model.student.inherit"] == "none"
    scratch = script.cell(tmp_path, "gdn*8", "scratch", 4, 1)
    for pipeline, samples in ((first, [32, 16, 16, 16]), (scratch, [16])):
        assert [stage.overrides["data.batch_size"] for stage in pipeline.stages] == samples
        assert {stage.overrides["trainer.devices"] for stage in pipeline.stages} == {1}
    halves = [stage.overrides["data.batch_size"] for stage in script.cell(tmp_path, "gdn*8", "none", 4, 2).stages]
    assert halves == [16, 8, 8, 8]


def test_only_stages_that_are_done_are_measured(script: ModuleType, tmp_path: Path) -> None:
    pipeline = script.cell(tmp_path, "gdn*8", "none", 0, 1)
    teacher = plan_steps(pipeline)[0]
    assert script.measured(pipeline) == {}
    names = ("parameters", "trainable_parameters", "steps", "tokens", "samples", "seconds")
    facts = {name: number for number, name in enumerate(names)} | {"metrics": {"test/exact": 0.5}, "pattern": "full*8"}
    run = StageRun(teacher.run.folder)
    run.begin(teacher.stage, teacher.key, [])
    run.model.mkdir(parents=True)
    (run.model / "config.json").touch()
    (run.folder / "metrics.json").write_text(json.dumps(facts))
    assert script.measured(pipeline) == {}
    run.finish("now")
    facts.pop("pattern")
    assert script.measured(pipeline) == {"teacher": facts}


def test_the_table(script: ModuleType) -> None:
    results = {}
    for seed, (teacher, layers, student, scratch) in enumerate(
        [(0.9, 0.5, 0.9, 0.2), (0.8, 0.6, 0.72, 0.3), (1.0, 0.7, 0.9, 0.1)]
    ):
        stages = {"layers": _stage(layers, 10), "logits": _stage(0.8, 4), "supervised": _stage(student, 6)}
        results["gdn*8", "none", seed] = {"teacher": _stage(teacher), **stages}
        results["gdn*8", "scratch", seed] = {"scratch": _stage(scratch, 20)}
    results["mamba2*8", "none", 0] = {"teacher": _stage(0.9), "layers": _stage(0.4)}
    text = script.table(results)

    def half(*values: float) -> float:
        mean = sum(values) / 3
        return 4.302653 * math.sqrt(sum((value - mean) ** 2 for value in values) / 2 / 3)

    teacher, student, gain = half(0.9, 0.8, 1.0), half(0.9, 0.72, 0.9), half(0.7, 0.42, 0.8)
    assert f"| teacher `full*8` | | | 0.900 ± {teacher:.3f} | | |" in text
    assert (
        f"| `gdn*8`, none | 0.600 ± {half(0.5, 0.6, 0.7):.3f} | 0.800 ± 0.000 | 0.840 ± {student:.3f} | "
        f"0.933 ± {half(1, 0.9, 0.9):.3f} | 20% |"
    ) in text
    assert f"| `gdn*8`, from scratch |  |  | 0.200 ± {half(0.2, 0.3, 0.1):.3f} |" in text
    assert "| `mamba2*8`, none | 0.400 (one seed) |  |  |  |  |" in text
    assert f"| `gdn*8`, none | 0.640 ± {gain:.3f} |" in text
