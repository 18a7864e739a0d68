"""Videos in conversations: the chat format, encoded samples, batches, rows of data sets and the data module."""

import json

import datasets
import numpy as np
import pytest
import torch
from data_cases import SMALL_IMAGES, assert_same_batches, small_module
from PIL import Image
from video_cases import write_video

from hybridvl.data.chat import IGNORED, ChatFormat
from hybridvl.data.collate import Collator
from hybridvl.data.encode import SampleEncoder
from hybridvl.data.images import ImageConfig, ImageProcessor
from hybridvl.data.messages import MessageData
from hybridvl.data.rows import MessageColumns
from hybridvl.data.tokens import load_tokenizer
from hybridvl.data.video import VideoConfig, VideoProcessor
from hybridvl.layers import ConfigError
from hybridvl.models.positions import PositionRules, VisualGrids, rope_positions

VIDEOS = VideoConfig(min_pixels=64, max_pixels=1024)
CLIP = [Image.new("L", (32, 16), 40 * number) for number in range(5)]
PICTURE = Image.new("L", (48, 32))


@pytest.fixture(scope="module")
def chat():
    return ChatFormat(load_tokenizer())


@pytest.fixture(scope="module")
def encoder(chat):
    images = ImageProcessor(ImageConfig(8, 2, 2, mean=(0.8,), std=(0.3,)))
    return SampleEncoder(chat, images, 512, videos=VideoProcessor(images, VIDEOS))


def question(*parts, answer="yes", **options):
    kinds = {str: "text", list: "video"}
    content = [{"type": (kind := kinds.get(type(part), "image")), kind: part} for part in parts]
    for part in content:
        part.update(options if part["type"] == "video" else {})
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def test_the_layout_with_videos(chat):
    messages = question(CLIP, PICTURE, "Which?")
    expected = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|video_pad|><|video_pad|><|vision_end|><|vision_start|><|image_pad|><|vision_end|>"
        "Which?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    )
    assert chat.render(messages, [1], [2]) == expected
    assert chat.encode(messages, [1], [2]).input_ids == chat.tokenizer(expected).input_ids
    with pytest.raises(ConfigError, match="show 1 videos, but 0 are given"):
        chat.encode(messages, [1])
    with pytest.raises(ConfigError, match="a video in an assistant turn"):
        chat.encode([{"role": "assistant", "content": [{"type": "video", "video": CLIP}]}], (), [1])


def test_an_example_has_a_token_for_every_four_patches(chat, encoder):
    example = encoder({"messages": question(CLIP, "What?", fps=4) + question(PICTURE, CLIP[:2], "And?")})
    assert example.video_grid_thw.tolist() == [[3, 2, 4], [1, 2, 4]]
    assert example.image_grid_thw.tolist() == [[1, 4, 6]]
    assert example.second_per_grid_ts.tolist() == [0.5, 1.0]
    assert (example.input_ids == chat.video_token_id).sum() * 4 == len(example.pixel_values_videos) == 32
    assert (example.input_ids == chat.image_token_id).sum() * 4 == len(example.pixel_values) == 24
    assert example.pixel_values_videos.shape[1] == 2 * 64
    assert (example.labels[example.input_ids == chat.video_token_id] == IGNORED).all()


def test_what_does_not_fit_is_named(chat, encoder):
    short = SampleEncoder(chat, encoder.images, 20, videos=encoder.videos)
    with pytest.raises(ConfigError, match=r"0 of them image tokens, 6 video tokens\), which does not fit"):
        short({"messages": question(CLIP, "What?")})
    content = [{"type": "video", "video": "gone.mp4"}]
    with pytest.raises(ConfigError, match=r"row 2\[0\]\.content\[0\]: video gone\.mp4 cannot be read: no such file"):
        encoder({"messages": [{"role": "user", "content": content}]}, "row 2")
    with pytest.raises(ConfigError, match=r"row 2\[0\]\.content\[0\]: option 'speed'; expected one of fps"):
        encoder({"messages": question(CLIP, speed=3)}, "row 2")


@pytest.mark.parametrize(("convention", "tokens"), [("v457", 2.0), ("v457", 4.0), ("v523", 3.0)])
def test_batches_carry_videos_and_their_positions(chat, encoder, convention, tokens):
    samples = [question(CLIP, "a", fps=0.7), question("text"), question(PICTURE, CLIP[:3], "b", fps=5)]
    examples = [encoder({"messages": messages}) for messages in samples]
    rules = VideoConfig(tokens_per_second=tokens, convention=convention)
    padded = Collator(chat, 2, videos=rules)(examples)
    packed = Collator(chat, 2, packing=True, videos=rules)(examples)
    for batch in (padded, packed):
        assert batch["video_grid_thw"].tolist() == [[3, 2, 4], [2, 2, 4]]
        assert torch.equal(batch["second_per_grid_ts"], torch.tensor([2 / 0.7, 0.4]))
        assert batch["second_per_grid_ts"].dtype == torch.float32
        assert torch.equal(
            batch["pixel_values_videos"],
            torch.tensor(np.concatenate([example.pixel_values_videos for example in examples])),
        )
    expected = rope_positions(
        PositionRules(
            image_token_id=6, video_token_id=7, merge_size=2, tokens_per_second=tokens, video_convention=convention
        ),
        padded["input_ids"],
        VisualGrids(padded["image_grid_thw"], padded["video_grid_thw"], padded["second_per_grid_ts"]),
        attention_mask=padded["attention_mask"],
    )
    assert torch.equal(padded["position_ids"], expected)
    real = padded["attention_mask"]
    assert torch.equal(packed["position_ids"][:, 0], expected[:, real])
    without = Collator(chat, 2)([examples[1]])
    assert not {"pixel_values_videos", "video_grid_thw", "second_per_grid_ts"} & set(without)


def test_time_passes_within_a_video(chat, encoder):
    batch = Collator(chat, 2)([encoder({"messages": question(CLIP, "a", fps=0.5)})])
    shown = batch["input_ids"][0] == chat.video_token_id
    times = batch["position_ids"][0, 0, shown]
    assert (times - times[0]).tolist() == [0, 0, 8, 8, 16, 16]  # 4 seconds a step, 2 units a second


def test_rows_show_their_videos(tmp_path):
    columns, files = MessageColumns(), [str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4")]

    def kinds(sample):
        return [(part["type"], part.get(part["type"])) for part in sample["messages"][0]["content"]]

    marked = [{"role": "user", "content": "<video>\nThen <image> and <video> end"}]
    row = {"messages": marked, "videos": ["a.mp4", "b.mp4"], "images": ["c.png"]}
    assert kinds(columns.sample(row, tmp_path, "row 0")) == [
        *(("video", files[0]), ("text", "Then "), ("image", str(tmp_path / "c.png"))),
        *(("text", " and "), ("video", files[1]), ("text", " end")),
    ]
    unmarked = [{"role": "user", "content": "Which?"}]
    row = {"messages": unmarked, "video": {"bytes": None, "path": "a.mp4"}, "image": {"bytes": b"x", "path": None}}
    assert kinds(columns.sample(row, tmp_path, "row 0")) == [("image", b"x"), ("video", files[0]), ("text", "Which?")]
    row = {"messages": unmarked, "videos": [["a.png", {"bytes": b"y"}]]}
    assert kinds(columns.sample(row, tmp_path, "row 0"))[0] == ("video", [str(tmp_path / "a.png"), b"y"])
    part = {"type": "video", "video": "a.mp4", "fps": 3, "image": None}
    row = {"messages": [{"role": "user", "content": [part]}]}
    (shown,) = columns.sample(row, tmp_path, "row 0")["messages"][0]["content"]
    assert shown == {"type": "video", "video": files[0], "fps": 3}
    numbered = [{"type": "image", "index": 0, "text": None}, {"type": "text", "index": None, "text": "Which?"}]
    row = {"messages": [{"role": "user", "content": numbered}], "images": ["c.png"]}
    assert columns.sample(row, tmp_path, "row 0")["messages"][0]["content"] == [
        {"type": "image", "image": str(tmp_path / "c.png")},
        {"type": "text", "text": "Which?"},
    ]
    numbered[0]["index"] = 1
    with pytest.raises(ConfigError, match="row 0: the messages show the images out of order; expected index 0 here"):
        columns.sample(row, tmp_path, "row 0")
    text = {"messages": [{"role": "user", "content": "a <video> tag"}]}
    assert columns.sample(text, tmp_path, "row 0")["messages"] == text["messages"]
    for given in (["a.mp4"], ["a.mp4"] * 3):
        with pytest.raises(ConfigError, match=rf"row 4: the messages show 2 videos, but the row has {len(given)}"):
            columns.sample({"messages": marked, "videos": given, "images": ["c.png"]}, tmp_path, "row 4")


@pytest.fixture
def video_rows(tmp_path, monkeypatch):
    """A JSON Lines file of nine conversations about four video files beside it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    for number in range(4):
        write_video(tmp_path / f"{number}.mp4", 6 + number, 6, size=(32, 32), codec="mpeg4")
    rows = []
    for number in range(9):
        content = [{"type": "video", "video": f"{number % 4}.mp4"}, {"type": "text", "text": "How many?"}]
        asked = {"role": "user", "content": content}
        rows.append({"messages": [asked, {"role": "assistant", "content": [{"type": "text", "text": str(number)}]}]})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("packing", [False, True])
def test_batches_of_a_data_set_with_videos(video_rows, packing):
    def module(workers):
        task = MessageData(str(video_rows), val_samples=1)
        return small_module(task, videos=VIDEOS, workers=workers, packing=packing, epoch_batches=2, max_tokens=300)

    batches = list(module(0).train_dataloader())
    for batch in batches:
        assert batch["video_grid_thw"][:, 1:].tolist() == [[4, 4]] * len(batch["answer_kinds"])
        assert len(batch["pixel_values_videos"]) == batch["video_grid_thw"].prod(1).sum()
        assert SMALL_IMAGES.temporal_patch_size == 1
        assert torch.equal(batch["second_per_grid_ts"], torch.tensor([1 / (4 / n * 6) for n in frames_of(batch)]))
    assert_same_batches(batches, list(module(1).train_dataloader()))
    video_rows.with_name("2.mp4").write_bytes(b"damaged")
    with pytest.raises(
        ConfigError, match=r"rows\.jsonl \(train\) row \d\[0\]\.content\[0\]: video .*2\.mp4 cannot be read"
    ):
        list(module(0).train_dataloader())


def frames_of(batch):
    """Frames of the files shown, told from the answers: digits are tokens of their own."""
    tokenizer = load_tokenizer()
    answers = tokenizer.decode([label for label in batch["labels"].flatten().tolist() if label != IGNORED])
    return [6 + int(number) % 4 for number in answers.split("<|im_end|>")[:-1]]
