"""benchmarks/long_context.py: questions asked from a state are the whole conversations', intervals, the report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scripts import load_script

import hybridvl
from hybridvl.data import ChatDataModule, ImageConfig
from hybridvl.data.probes.frame_recall import FrameRecall
from hybridvl.inference.processor import Processor
from hybridvl.models.config import ModelConfig, VisionConfig
from hybridvl.models.vlm import VisionLanguageModel


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("long_context")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model with its processor."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"patch_size": 8, "temporal_patch_size": 1, "spatial_merge_size": 1, "window_size": 8, "channels": 1}
    vision = VisionConfig(depth=1, width=32, heads=2, mlp_width=32, full_attention_blocks=(0,), **sizes)
    tokens = {"image_token_id": 6, "video_token_id": 7, "vision_start_token_id": 3}
    mixers = {"swa": {"heads": 2, "kv_heads": 1, "head_dim": 16, "window": 8}, "gdn": {"heads": 2, "head_dim": 8}}
    torch.manual_seed(0)
    config = ModelConfig(
        pattern="gdn swa", width=32, mlp_width=32, vocab_size=512, init_std=0.5, mixers=mixers, vision=vision, **tokens
    )
    hybridvl.save(VisionLanguageModel(config), folder)
    images = ImageConfig(8, 1, 1, min_pixels=64, mean=(0.8,), std=(0.3,))
    data = ChatDataModule(FrameRecall(), images=images, system=None)
    Processor(data.chat, data.images, data.videos).save(folder)
    return folder


def test_a_reply_from_the_state_is_that_to_the_whole_conversation(script: ModuleType, folder: Path) -> None:
    model, processor = hybridvl.load(folder), Processor.load(folder)
    source = FrameRecall(frames=7, items=3, eval_turns=3).source("test", 0)
    samples = [source.sample(number, 0) for number in range(4)]
    inputs, tails, answers = script._inputs(processor, samples)
    replies = torch.empty(4, 3, dtype=torch.int64)
    for row, sample in enumerate(samples):
        first, *later = sample["messages"][::2]
        for column, question in enumerate((first, *later)):
            content = [*first["content"][:-1], question["content"][-1]]
            with torch.no_grad():
                logits = model(**processor.prompt([{"role": "user", "content": content}])).logits
            replies[row, column] = logits[0, -1].argmax()
    assert len(set(replies.flatten().tolist())) > 1
    assert script._right(model, inputs, tails, replies).all()
    assert not script._right(model, inputs, tails, replies + 1).any()
    texts = [message["content"] for sample in samples for message in sample["messages"][1::2]]
    assert [processor.text([token]) for token in answers.flatten().tolist()] == texts


def test_the_interval_of_one_model_is_that_of_independent_streams(script: ModuleType) -> None:
    right = np.random.default_rng(1).random((1, 400, 1)) < 0.8
    found = script.summary(right, np.full((400, 1), "lag_1"))
    rate = right.mean()
    margin = 1.96 * math.sqrt(rate * (1 - rate) / 400)
    assert found["accuracy"] == pytest.approx(rate)
    assert found["interval"] == pytest.approx([rate - margin, rate + margin], abs=0.005)
    # Four questions of a stream that are right or wrong together say no more than one.
    assert script.summary(right.repeat(4, axis=2), np.full((400, 4), "lag_1"))["interval"] == found["interval"]


def test_the_report(script: ModuleType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    models = ["--models", f"one={folder}", f"two={folder}", f"one={folder}"]
    assert script.main([*models, "--frames", "4", "9", "--streams", "6", "--json", str(path)]) == 0
    records = json.loads(path.read_text())["measurements"]
    assert [(record["model"], record["frames"]) for record in records] == [
        *(("one", 4), ("two", 4), ("one", 9), ("two", 9)),
    ]
    for record in records:
        assert record["questions"] == 24
        assert len(record["of_each"]) == (2 if record["model"] == "one" else 1)
        assert sum(kind["questions"] for kind in record["by_kind"].values()) == 24
        assert record["interval"][0] <= record["accuracy"] <= record["interval"][1]
    assert "9 frames" in capsys.readouterr().out
