"""Triton kernels without a GPU: their numbers in Triton's interpreter, and that they compile for one.

Both need a process of their own: whether kernels are interpreted is decided when they are defined, and tests of fla in
this process expect that they are not.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "kernels"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (the dev extra has it)")
@pytest.mark.parametrize("interpreted", [True, False], ids=["interpreted", "compiled"])
def test_kernels(interpreted: bool, tmp_path: Path) -> None:
    removed = ("HYBRIDVL_BACKEND", "TRITON_INTERPRET")
    environment = {name: value for name, value in os.environ.items() if name not in removed}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_CACHE_DIR": str(tmp_path)}
    files = [FOLDER / "compile_kernels.py"]
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
        files = sorted(set(FOLDER.glob("*_kernels.py")) - set(files))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *map(str, files)]
    done = subprocess.run(command, env=environment, cwd=FOLDER.parents[2], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
