"""benchmarks/divergence.py at a tiny size: both sides agree, and both are measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from hybridvl.training.losses.divergences import DIVERGENCES

ROOT = Path(__file__).parents[2]


def test_every_kind_is_compared_and_measured(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    sizes = ["--tokens", "300", "--width", "8", "--vocabulary", "700", "--token-chunk", "16", "--vocab-chunk", "300"]
    choices = ["--kinds", *DIVERGENCES, "--heads", "trained", "frozen", "--rounds", "2", "--json", str(path)]
    command = [sys.executable, str(ROOT / "benchmarks" / "divergence.py"), *sizes, *choices]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(path.read_text())
    found = [(record["kind"], record["head"]) for record in report["measurements"]]
    assert found == [(kind, head) for kind in DIVERGENCES for head in ("trained", "frozen")]
    for record in report["measurements"]:
        assert (record["tokens"], record["vocabulary"]) == (300, 700)
        names = {"value", "student_hidden", *(["student_weight"] if record["head"] == "trained" else [])}
        assert record["relative_errors"].keys() == names
        assert all(error < 1e-4 for error in record["relative_errors"].values())
        for side in ("ours", "full_logits"):
            assert [len(values) for values in record[side].values()] == [2, 2, 2]
            assert all(seconds > 0 for seconds in record[side]["seconds"])
        assert record["time_ratio"] > 0
