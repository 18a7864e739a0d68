"""Kills a sweep of 24 short runs at random moments, its runs, or both, and counts what is lost, done twice, or other.

    python benchmarks/sweep_kills.py --root FOLDER

The study is two-layer models on small pages of digits for a few steps. After each of the kills (SIGKILL) no process of
the study may be left; the last sweep is let alone, and then every run must be done, through to its last line exactly
once. The same study is then swept once more, elsewhere and without kills: every metric of every run must be equal to
the last digit. The last line printed is a count of all that as JSON, and the exit status is 0 if it is as it should be.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

RECIPE = Path(__file__).parents[1] / "recipes" / "digits.yaml"
PATTERNS = {"hybrid": "swa gdn", "window": "swa*2", "linear": "gdn*2", "mamba2": "mamba2*2"}
STUDY: dict[str, Any] = {
    "name": "kills",
    "recipe": "digits.yaml",
    "overrides": {
        "trainer.max_steps": 30,
        "trainer.devices": 1,
        "trainer.val_check_interval": 30,
        "trainer.limit_val_batches": 1,
        "checkpoints.every_n_steps": 10,
        "data.batch_size": 2,
        "data.task.init_args.test_pages": 8,
        "model.net.width": 32,
        "examples.count": 0,
    },
    "axes": {"mixer": {"key": "model.net.pattern", "values": PATTERNS}},
    "seeds": list(range(6)),
    "metrics": ["val/exact"],
}
RUNS = len(PATTERNS) * len(STUDY["seeds"])
KILLED, WHOLE = "runs", "whole"  # roots of the two studies
VICTIMS = ("parent", "child", "both")
GRACE = 10.0  # seconds in which the kernel must have ended what a killed process had started


def main(arguments: Sequence[str]) -> int:
    """Kill, go on, count, compare; returns 0 if nothing was lost, done twice or other, and nobody was left behind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="an empty folder")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument(
        "--longest", type=float, default=60.0, help="seconds after which a sweep is killed at the latest"
    )
    parser.add_argument("--seed", type=int, default=0, help="of moments and victims")
    chosen = parser.parse_args(arguments)
    chosen.root.mkdir(parents=True, exist_ok=True)
    if any(chosen.root.iterdir()):
        parser.error(f"--root: {chosen.root} is not empty")
    (chosen.root / "digits.yaml").write_text(OmegaConf.to_yaml(OmegaConf.load(RECIPE)))
    (chosen.root / "study.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    rng = random.Random(chosen.seed)
    orphans = 0
    for number in range(chosen.kills):
        sweep = _start(chosen.root)
        time.sleep(rng.uniform(1, chosen.longest))
        victim = rng.choice(VICTIMS)
        killed = _kill(sweep, victim, rng)
        if victim == "child":
            sweep.send_signal(signal.SIGTERM)  # the rest is stopped in order
        sweep.wait()
        orphans += _orphans(chosen.root)
        done = len(results(chosen.root / KILLED))
        print(f"kill {number + 1}: {victim} ({killed} processes), {done} of {RUNS} done, {orphans} orphans", flush=True)
    report = {"exit status": _start(chosen.root).wait()}
    completions = [_completions(path) for path in _runs(chosen.root / KILLED)]
    killed_results = results(chosen.root / KILLED)
    report |= {"runs": len(completions), "done": len(killed_results), "completed once": completions.count(1)}
    report |= {"orphans": orphans + _orphans(chosen.root)}
    report |= {"exit status without kills": _start(chosen.root, WHOLE).wait()}
    different = differences(killed_results, results(chosen.root / WHOLE))
    print("".join(f"{line}\n" for line in different), end="")
    report |= {"different": len(different)}
    print(json.dumps(report))
    counts = {"runs": RUNS, "done": RUNS, "completed once": RUNS}
    return int(report != {**dict.fromkeys(report, 0), **counts})


def results(root: Path) -> dict[str, dict[str, float]]:
    """The metrics of the runs that are done, by cell and seed."""
    found = {}
    for run in _runs(root):
        path = run / "metrics.json"
        facts = json.loads(path.read_text()) if path.exists() else {}
        if "ended" in facts:
            found[f"{run.parent.name}/{run.name}"] = facts["metrics"]
    return found


def differences(killed: Mapping[str, Mapping[str, float]], whole: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A line for each run of either study of which a metric is another, or that the other study has not."""
    lines = []
    for name in sorted({*killed, *whole}):
        ends = [study.get(name) for study in (killed, whole)]
        texts = [json.dumps(end, sort_keys=True) for end in ends]  # in which NaN is NaN
        if texts[0] != texts[1] or not all(ends):
            lines.append(f"{name}: {texts[0]}; without kills {texts[1]}")
    return lines


def _start(folder: Path, root: str = KILLED) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "hybridvl", "sweep", "study.yaml", f"--root={root}"]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)


def _kill(sweep: subprocess.Popen[bytes], victim: str, rng: random.Random) -> int:
    """Kill the sweep, one of its runs, or both; returns how many were there to be killed."""
    children = [int(pid) for pid in Path(f"/proc/{sweep.pid}/task/{sweep.pid}/children").read_text().split()]
    killed = [rng.choice(children)] if children and victim != "parent" else []
    killed += [sweep.pid] if victim != "child" else []
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    return len(killed)


def _orphans(root: Path) -> int:
    """Processes that still work in the study's folder after a while."""
    until = time.monotonic() + GRACE
    while (left := _working_in(root)) and time.monotonic() < until:
        time.sleep(0.1)
    return left


def _working_in(root: Path) -> int:
    count = 0
    for place in Path("/proc").glob("[0-9]*"):
        try:
            count += os.readlink(place / "cwd") == str(root.resolve()) and bool((place / "cmdline").read_bytes())
        except OSError:  # it has just ended
            continue
    return count


def _runs(root: Path) -> list[Path]:
    return [path.with_suffix("") for path in sorted((root / "kills").glob("*/seed_?.json"))]


def _completions(run: Path) -> int:
    """How often a run got to the last line that a fit prints."""
    return run.with_name(f"{run.name}.log").read_text().count("watch        tensorboard")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
