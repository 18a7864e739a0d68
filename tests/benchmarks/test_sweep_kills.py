"""benchmarks/sweep_kills.py: what it takes for a result, and for another one than that of a sweep without kills."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from scripts import load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("sweep_kills")


def _run(root: Path, name: str, **facts: object) -> None:
    folder = root / "kills" / name
    folder.mkdir(parents=True)
    folder.with_name(f"{folder.name}.json").write_text("{}")
    folder.with_name(f"{folder.name}.ended.json").write_text("{}")
    (folder / "metrics.json").write_text(json.dumps(facts))


def test_only_what_is_through_is_a_result(script: ModuleType, tmp_path: Path) -> None:
    _run(tmp_path, "mixer=linear/seed_0", metrics={"val/exact": 0.5}, ended="now")
    _run(tmp_path, "mixer=linear/seed_1", metrics={"val/exact": 0.5})  # its test is still to come
    (tmp_path / "kills" / "mixer=linear" / "seed_2.json").write_text("{}")
    assert script.results(tmp_path) == {"mixer=linear/seed_0": {"val/exact": 0.5}}
    assert [path.name for path in script._runs(tmp_path)] == ["seed_0", "seed_1", "seed_2"]


def test_every_metric_must_be_equal(script: ModuleType) -> None:
    whole = {"a": {"val/exact": 0.1 + 0.2, "test/loss": float("nan")}, "b": {"val/exact": 1.0}}
    assert script.differences(whole, {name: dict(metrics) for name, metrics in whole.items()}) == []
    for killed, name in (
        ({**whole, "b": {"val/exact": 1.0 + 2**-52}}, "b"),
        ({**whole, "a": {"val/exact": 0.3, "test/loss": float("nan")}}, "a"),
        ({**whole, "a": {"val/exact": 0.1 + 0.2}}, "a"),
        ({"a": whole["a"]}, "b"),
    ):
        for pair in ((killed, whole), (whole, killed)):
            (line,) = script.differences(*pair)
            assert line.startswith(f"{name}: ")
    assert script.differences({"a": {}}, {"a": {}}) == ["a: {}; without kills {}"]


def test_its_study_has_as_many_runs_as_it_says(script: ModuleType, tmp_path: Path) -> None:
    assert script.RUNS == 24
    assert f"a sweep of {script.RUNS} short runs" in script.__doc__
    (tmp_path / "left").touch()
    with pytest.raises(SystemExit):
        script.main(["--root", str(tmp_path)])
