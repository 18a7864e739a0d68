"""What clusters do to a sweep: Ctrl-C, jobs that fail, settings that are none, and nothing left to do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from hybridvl.ablation import ray_tune, slurm
from hybridvl.ablation.cells import Cell, Run
from hybridvl.ablation.engine import Work
from hybridvl.ablation.records import RunRecord
from hybridvl.ablation.slurm import run_on_slurm
from hybridvl.layers.errors import ConfigError

MARK = "HYBRIDVL_TEST_MARK"
# Stands for `hybridvl fit` in every Python that is started: trains until a signal, and is done at once when it goes on.
FIT = """
import os, signal, sys, time
if sys.orig_argv[1:4] == ["-m", "hybridvl", "fit"]:
    given = dict(word[2:].split("=", 1) for word in sys.orig_argv if word.startswith("--") and "=" in word)
    folder = os.path.join(given["run.root"], given["run.name"], given["run.version"])
    os.makedirs(os.path.join(folder, "checkpoints"), exist_ok=True)
    open(os.path.join(folder, "checkpoints", "last.ckpt"), "w").close()
    if "ckpt_path" in given:
        with open(os.path.join(folder, "metrics.json"), "w") as file:
            file.write('{"ended": "now", "metrics": {"val/exact": 0.5}}')
        os._exit(0)
    signal.signal(signal.SIGTERM, lambda *given: os._exit(143))
    open(os.path.join(folder, "trains"), "w").close()
    while True:
        time.sleep(0.05)
"""
# The same, for fits that write which GPUs they see and wait until both have begun.
GPU_FIT = """
import os, sys, time
if sys.orig_argv[1:4] == ["-m", "hybridvl", "fit"]:
    given = dict(word[2:].split("=", 1) for word in sys.orig_argv if word.startswith("--") and "=" in word)
    folder = os.path.join(given["run.root"], given["run.name"], given["run.version"])
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "gpus"), "w") as file:
        file.write(os.environ.get("CUDA_VISIBLE_DEVICES", "as it was"))
    others = [os.path.join(given["run.root"], name, given["run.version"], "gpus") for name in "ab"]
    until = time.monotonic() + 60
    while time.monotonic() < until and not all(map(os.path.exists, others)):
        time.sleep(0.05)
    with open(os.path.join(folder, "metrics.json"), "w") as file:
        file.write('{"ended": "now", "metrics": {"val/exact": 0.5}}')
    os._exit(0)
"""
# A cluster until the end of its input.
CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 2})
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
# A sweep of two runs by one of the engines, without what the command line does before.
SWEEP = """
import sys
from pathlib import Path
from hybridvl.ablation.cells import Cell, Run
from hybridvl.ablation.engine import Work
root, runs = Path("runs"), []
for name in "ab":
    words = ["fit", f"--run.root={root}", f"--run.name={name}", "--run.version=seed_0"]
    runs.append(Run(Cell({"x": name}, {}, name), 0, root / name / "seed_0", words, "key"))
if sys.argv[1] == "slurm":
    from hybridvl.ablation.slurm import run_on_slurm
    engine = run_on_slurm(Work(runs, root), 2, {"cluster": "local"})
else:
    from hybridvl.ablation.ray_tune import run_on_ray
    engine = run_on_ray(Work(runs, root), 2, 1)
print(engine.signal, *engine.statuses, *engine.troubles)
"""


def _sweep(folder: Path, engine: str) -> subprocess.Popen[str]:
    """As a terminal starts it: in a process group of its own, which gets Ctrl-C as a whole."""
    paths = os.pathsep.join([str(folder), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", SWEEP, engine],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, MARK: str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _left_behind(folder: Path) -> list[str]:
    """Command lines of processes that the sweeps in a folder have started."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={folder}\0".encode() in (place / "environ").read_bytes():
                found.append((place / "cmdline").read_text().replace("\0", " "))
        except OSError:  # it has just ended
            continue
    return [line for line in found if line]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("engine", ["slurm", "ray"])
def test_an_interrupt_is_handed_on_once_and_leaves_nobody_behind(engine: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(FIT)
    records = [RunRecord(tmp_path / "runs" / name / "seed_0") for name in "ab"]
    sweep = _sweep(tmp_path, engine)
    until = time.monotonic() + 120
    while sweep.poll() is None and not all((record.folder / "trains").exists() for record in records):
        assert time.monotonic() < until
        time.sleep(0.1)
    os.killpg(sweep.pid, signal.SIGINT)
    out, err = sweep.communicate(timeout=120)
    assert (sweep.returncode, out.splitlines()[-1].split()) == (0, [str(int(signal.SIGINT)), "stopped", "stopped"]), (
        out + err
    )
    assert "Traceback" not in err
    until = time.monotonic() + 20
    while _left_behind(tmp_path) and time.monotonic() < until:
        time.sleep(0.1)
    assert _left_behind(tmp_path) == []
    for record in records:
        assert record.state == "stopped"
        ended = json.loads(record.ended.read_text())
        assert (ended["status"], ended["signal"]) == (143, signal.SIGTERM)  # in order, not killed
    out, err = _sweep(tmp_path, engine).communicate(timeout=120)
    assert out.splitlines()[-1].split() == ["None", "done", "done"], out + err
    assert [json.loads(record.started.read_text())["attempts"] for record in records] == [2, 2]


def test_trials_have_gpus_where_the_cluster_has_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command is typed where there is none, for a cluster of another process that says that it has two."""
    pytest.importorskip("ray")
    (tmp_path / "sitecustomize.py").write_text(GPU_FIT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    cluster = subprocess.Popen(
        [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    try:
        assert cluster.stdout is not None
        monkeypatch.setenv("RAY_ADDRESS", cluster.stdout.readline().strip())
        out, err = _sweep(tmp_path, "ray").communicate(timeout=120)
    finally:
        cluster.communicate(timeout=60)
    assert out.splitlines()[-1].split() == ["None", "done", "done"], out + err
    assert sorted((tmp_path / "runs" / name / "seed_0" / "gpus").read_text() for name in "ab") == ["0", "1"]


def _work(folder: Path, count: int, done: bool) -> Work:
    cells = [Cell({"a": str(number)}, {}, f"a={number}") for number in range(count)]
    found = [Run(cell, 0, folder / cell.name / "seed_0", ["fit"], "key") for cell in cells]
    for run in found if done else []:
        record = RunRecord(run.folder)
        record.begin(run.key, run.cell.labels, run.seed, run.arguments)
        record.folder.mkdir()
        (record.folder / "metrics.json").write_text('{"ended": "now"}')
    return Work(found, folder)


def test_nothing_is_submitted_when_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "init", lambda: pytest.fail("Ray was started"))
    work = _work(tmp_path, 2, done=True)
    for engine in (run_on_slurm(work, 2, {"cluster": "local"}), ray_tune.run_on_ray(work, 2, 1)):
        assert engine.statuses == ["done", "done"]
        assert engine.troubles == []
    assert not list(tmp_path.glob(".slurm/*"))
    assert not (tmp_path / ".ray").exists()


@pytest.mark.parametrize(("runs", "jobs"), [(3, 2), (1, 4)])
def test_jobs_that_fail_are_told_with_their_logs(
    runs: int, jobs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "_GRACE", 0.5)
    engine = run_on_slurm(_work(tmp_path, runs, done=False), jobs, {"cluster": "local", "local_setup": ["exit 3"]})
    assert engine.statuses == ["stopped"] * runs
    assert len(engine.troubles) == min(runs, jobs)  # there are no more jobs than runs
    for trouble in engine.troubles:
        assert trouble.startswith("job ")
        assert "failed: it has printed nothing" in trouble
        assert str(tmp_path / ".slurm") in trouble


def test_trials_that_fail_are_told_with_their_folders() -> None:
    good, bad = (SimpleNamespace(error=error, path="there") for error in (None, ValueError("a\nb: no cores")))
    assert ray_tune._troubles([[good, bad]]) == ["trial failed: b: no cores (log: there)"]
    assert ray_tune._troubles([[good]]) == []
    assert "has given up" in ray_tune._troubles([])[0]


def test_slurm_needs_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"^--engine slurm: no srun here; expected .*--slurm\.cluster local"):
        run_on_slurm(_work(tmp_path, 1, done=False), 1, {})
    with pytest.raises(ConfigError, match=r"^--slurm\.cluster: pbs; expected one of slurm, local"):
        run_on_slurm(_work(tmp_path, 1, done=False), 1, {"cluster": "pbs"})


def test_what_slurm_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster of two commands, of which one refuses the partition."""
    commands = tmp_path / "bin"
    commands.mkdir()
    refusal = "sbatch: error: invalid partition specified: nowhere"
    for name, text in (("srun", "exit 0"), ("sbatch", f"echo '{refusal}' >&2; exit 1")):
        (commands / name).write_text(f"#!/bin/sh\n{text}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(ConfigError, match=r"^--slurm: .*invalid partition"):
        run_on_slurm(_work(tmp_path, 1, done=False), 1, {"slurm_partition": "nowhere"})
