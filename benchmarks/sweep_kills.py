"""Kills a sweep of 24 short runs at random moments, its runs, or both, and counts what is lost or done twice.

    python benchmarks/sweep_kills.py --root FOLDER

The study is two-layer models on small pages of digits for a few steps. After each of the kills (SIGKILL) no process of
the study may be left; the last sweep is let alone, and then every run must be done, through to its last line exactly
once.
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
from collections.abc import Sequence
from pathlib import Path

import yaml
from omegaconf import OmegaConf

RECIPE = Path(__file__).parents[1] / "recipes" / "digits.yaml"
PATTERNS = {"hybrid": "swa gdn", "window": "swa*2", "linear": "gdn*2", "mamba2": "mamba2*2"}
STUDY = {
    "name": "kills",
    "root": "runs",
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
VICTIMS = ("parent", "child", "both")
GRACE = 10.0  # seconds in which the kernel must have ended what a killed process had started


def main(arguments: Sequence[str]) -> int:
    """Kill, go on, count; returns 0 if nothing was lost or done twice and nobody was left behind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="an empty folder")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument(
        "--longest", type=float, default=60.0, help="seconds after which a sweep is killed at the latest"
    )
    parser.add_argument("--seed", type=int, default=0, help="of moments and victims")
    chosen = parser.parse_args(arguments)
    chosen.root.mkdir(parents=True, exist_ok=True)
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
        done = sum(_is_done(path) for path in _runs(chosen.root))
        print(f"kill {number + 1}: {victim} ({killed} processes), {done} of 24 done, {orphans} orphans", flush=True)
    status = _start(chosen.root).wait()
    completions = [_completions(path) for path in _runs(chosen.root)]
    report = {"exit status": status, "runs": len(completions), "done": sum(map(_is_done, _runs(chosen.root)))}
    report |= {"completed once": completions.count(1), "orphans": orphans + _orphans(chosen.root)}
    print(json.dumps(report))
    return int(report != {"exit status": 0, "runs": 24, "done": 24, "completed once": 24, "orphans": 0})


def _start(root: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "hybridvl", "sweep", "study.yaml"]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL)


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
    return [path.with_suffix("") for path in sorted((root / "runs" / "kills").glob("*/seed_?.json"))]


def _is_done(run: Path) -> bool:
    path = run / "metrics.json"
    return path.exists() and "ended" in json.loads(path.read_text())


def _completions(run: Path) -> int:
    """How often a run got to the last line that a fit prints."""
    return run.with_name(f"{run.name}.log").read_text().count("watch        tensorboard")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
