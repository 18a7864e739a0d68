"""Training, validation and scored replies on a data set of videos."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch
from PIL import Image
from video_cases import write_video

from hybridvl.data.images import ImageConfig
from hybridvl.data.messages import MessageData
from hybridvl.data.module import ChatDataModule
from hybridvl.data.video import VideoConfig
from hybridvl.layers import ConfigError
from hybridvl.training.agreement import check_agreement
from hybridvl.training.answers import model_inputs, split_questions
from hybridvl.training.optim import OptimizerConfig
from hybridvl.training.supervised import SupervisedTuning

IMAGE, VIDEO = 6, 7


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two questions about each of six clips, half of them after a picture."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    Image.new("L", (8, 16), 100).save(tmp_path / "picture.png")
    lines = []
    for number in range(6):
        write_video(tmp_path / f"{number}.mp4", 4 + number, 4, size=(16, 16), codec="mpeg4")
        parts = [{"type": "video", "video": f"{number}.mp4"}, {"type": "text", "text": "How many?"}]
        parts[:0] = [{"type": "image", "image": "picture.png"}] * (number % 2)
        again: Any = [{"type": "text", "text": "Again?"}, {"type": "video", "video": "0.mp4"}]
        turns = [("user", parts), ("assistant", str(number)), ("user", again), ("assistant", "4")]
        as_parts = [c if isinstance(c, list) else [{"type": "text", "text": c}] for _, c in turns]
        lines.append({"messages": [{"role": r, "content": c} for (r, _), c in zip(turns, as_parts, strict=True)]})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def data(rows: Path, packing: bool = False) -> ChatDataModule:
    return ChatDataModule(
        MessageData(str(rows), val_samples=2),
        images=ImageConfig(tiny.PATCH, 1, 2, mean=(0.5,), std=(0.5,)),
        videos=VideoConfig(min_pixels=64, max_pixels=64),
        batch_size=2,
        max_tokens=256,
        packing=packing,
        epoch_batches=2,
    )


@pytest.mark.parametrize("packing", [False, True])
def test_two_steps_and_replies(rows: Path, tmp_path: Path, packing: bool) -> None:
    module = SupervisedTuning(tiny.net(), OptimizerConfig(lr=1e-2), reply_tokens=2)
    assert module.net.visual is not None
    before = module.net.visual.patch_embed.proj.weight.clone()
    trainer = tiny.trainer(tmp_path / "runs", 2, [])
    trainer.fit(module, datamodule=data(rows, packing))
    assert trainer.global_step == 2
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    assert not torch.equal(before, module.net.visual.patch_embed.proj.weight)
    scores = trainer.test(module, datamodule=data(rows), verbose=False)
    assert set(scores[0]) >= {"test/exact"}


@pytest.mark.parametrize("packing", [False, True])
def test_questions_show_the_videos_of_their_prompts(rows: Path, packing: bool) -> None:
    batch = next(iter(data(rows, packing).train_dataloader()))
    assert {"pixel_values_videos", "video_grid_thw", "second_per_grid_ts"} <= set(model_inputs(batch))
    questions = split_questions(batch, IMAGE, 4, VIDEO)
    assert [question.row for question in questions[:4]] == [0, 0, 1, 1]
    for question in questions:
        assert question.pixel_values_videos is not None
        assert question.video_grid_thw is not None
        assert question.second_per_grid_ts is not None
        assert len(question.second_per_grid_ts) == len(question.video_grid_thw)
        assert int(question.video_grid_thw.prod(1).sum()) == len(question.pixel_values_videos)
        assert int((question.prompt == VIDEO).sum()) * 4 == len(question.pixel_values_videos)
        images = 0 if question.pixel_values is None else len(question.pixel_values)
        assert int((question.prompt == IMAGE).sum()) * 4 == images
    last = questions[1::2]  # with both turns in their prompts
    for name in ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts"):
        assert torch.equal(torch.cat([getattr(question, name) for question in last]), batch[name])


def test_what_model_and_data_say_of_time_must_agree(rows: Path) -> None:
    for change, message in (
        ({"tokens_per_second": 4.0}, r"data\.videos\.tokens_per_second: 2\.0; model\.net\.tokens_per_second is 4\.0"),
        ({"video_convention": "v523"}, r"data\.videos\.convention: 'v457'; model\.net\.video_convention is 'v523'"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_agreement(dataclasses.replace(tiny.net(), **change), data(rows))
