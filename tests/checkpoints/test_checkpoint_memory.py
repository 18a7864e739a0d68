"""Loading maps the files: memory grows by hardly more than the weights, and no second copy is made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hybridvl
from hybridvl.models.config import ModelConfig
from hybridvl.models.vlm import VisionLanguageModel

LOAD = """
import os, sys
from pathlib import Path
import torch
import hybridvl
from hybridvl.checkpoints import load

os.fsync = lambda handle: None  # a slow disk is not what is measured

def peak():  # of this process; getrusage's figure may be its parent's
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

load(sys.argv[1])  # a small model first: what imports and libraries take is not the checkpoint's
before = peak()
model = load(sys.argv[2])
print(peak() - before)
hybridvl.save(model, sys.argv[2] + ".out")
print(peak() - before)
del model
model = load(sys.argv[2], dtype=torch.float32)
print(peak() - before)
"""


def write(folder: Path, width: int) -> None:
    config = ModelConfig(pattern="swa gdn*2", width=width, mlp_width=4 * width, vocab_size=1000, tie_embeddings=False)
    with torch.device("meta"):
        model = VisionLanguageModel(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    hybridvl.save(model, folder, max_shard_size="64MB")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_peak_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda handle: None)
    small, large = tmp_path / "small", tmp_path / "large"
    write(small, 64)
    write(large, 1536)
    size = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    assert size > 200e6
    command = [sys.executable, "-c", LOAD, str(small), str(large)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded, saved, widened = (int(line) for line in done.stdout.split())
    assert 0.8 * size < loaded < 1.2 * size
    assert saved < 1.2 * size
    assert widened < 2 * size + 300e6  # files are unmapped every 256 MiB
