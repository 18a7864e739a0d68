"""Tests of hybridvl.data.video: which frames, how large, in which order, against transformers' and explicit rules."""

import ast
import math
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from video_cases import decode_all, write_video

from hybridvl.data.images import ImageConfig, ImageProcessor, smart_resize
from hybridvl.data.video import VideoConfig, VideoProcessor
from hybridvl.layers import ConfigError

FOLDER = Path(__file__).parents[1] / "data" / "qwen2_5_vl_preproc"
IMAGES = ImageProcessor(ImageConfig())
TINY = VideoConfig(min_pixels=1, max_pixels=3136)


@pytest.fixture(scope="module")
def transformers_method():
    """Methods of transformers' video processor, taken out of the file: importing it would need torchvision."""
    source = find_spec("transformers.models.qwen2_vl.video_processing_qwen2_vl").origin
    tree = ast.parse(Path(source).read_text())
    (owner,) = [node for node in tree.body if getattr(node, "name", "") == "Qwen2VLVideoProcessor"]
    methods = [node for node in owner.body if getattr(node, "name", "") in ("sample_frames", "patchify")]
    future = ast.parse("from __future__ import annotations").body
    names = {"torch": torch, "math": math}
    exec(compile(ast.Module(future + methods, type_ignores=[]), source, "exec"), names)
    return names


def explicit_count(total, rate, fps, low, high):
    """The rule of qwen-vl-utils for videos of at least two frames, written out."""
    wanted = total / rate * fps
    wanted = max(wanted, 2 * math.ceil(low / 2))
    wanted = min(wanted, 2 * math.floor(min(high, total) / 2), total)
    return 2 * math.floor(wanted / 2)


@given(
    st.integers(2, 3000),
    st.sampled_from([1.0, 7.5, 24000 / 1001, 25.0, 30.0, 60.0]),
    st.sampled_from([0.5, 1.0, 2.0, 3.3, 100.0]),
    st.integers(1, 12),
    st.integers(12, 768),
)
@settings(deadline=None, max_examples=200)
def test_frames_equal_transformers_and_the_written_out_rule(transformers_method, total, rate, fps, low, high):
    config = VideoConfig(fps=fps, min_frames=low, max_frames=high, sampling="steps")
    count = config.frame_count(total, rate, 2)
    assert count == explicit_count(total, rate, fps, low, high)
    ends = VideoConfig(fps=fps).frame_indices(total, count)
    assert ends == torch.linspace(0, total - 1, count).round().long().tolist()
    assert (ends[0], ends[-1]) == (0, total - 1)
    if low % 2 == 0:  # transformers leaves an odd minimum odd before it rounds down
        processor = SimpleNamespace(num_frames=None)
        metadata = SimpleNamespace(total_num_frames=total, fps=rate)
        theirs = transformers_method["sample_frames"](processor, metadata, 2, low, high, fps=fps).tolist()
        assert config.frame_indices(total, count) == theirs[:count]


def test_default_limits_are_those_of_the_published_model():
    config = VideoConfig()
    assert (config.fps, config.min_frames, config.max_frames) == (2.0, 4, 768)
    assert config.pixel_limits(28, 4, 2) == (128 * 28 * 28, 768 * 28 * 28)
    # 768 frames share 90,316,800 pixels a step of two frames, down to 1.05 times the minimum.
    assert config.pixel_limits(28, 768, 2) == (100352, 90316800 / 768 * 2)
    assert config.pixel_limits(28, 4000, 2) == (100352, int(100352 * 1.05))
    assert VideoConfig(max_pixels=50000).pixel_limits(28, 4, 2) == (50000, 50000)
    assert VideoConfig(min_pixels=10**6).pixel_limits(28, 4, 2) == (10**6, 1050000)
    assert VideoConfig(total_pixels=10**6).pixel_limits(28, 10, 2) == (100352, 200000)


def test_frames_in_a_short_video():
    assert [VideoConfig().frame_count(total, 25.0, 2) for total in (1, 2, 3, 4, 5, 50)] == [1, 2, 2, 4, 4, 4]
    assert [VideoConfig(frames=n).frame_count(50, 25.0, 2) for n in (2, 5, 7, 50)] == [2, 4, 8, 50]
    assert VideoConfig().frame_count(3, 25.0, 1) == 3
    with pytest.raises(ConfigError, match="clip: frames: 60; expected 2 to 50"):
        VideoConfig(frames=60).frame_count(50, 25.0, 2, "clip")


def test_recorded_video():
    inputs, expected = (load_file(FOLDER / f"{name}.safetensors") for name in ("inputs", "expected"))
    frames = inputs["video_u8_thwc"].numpy()
    for source in (frames, list(frames), [Image.fromarray(frame) for frame in frames]):
        # Limits at the size of the frames themselves: nothing is resized, as when it was recorded.
        rows, grid, seconds = VideoProcessor(IMAGES, VideoConfig(min_pixels=1568, max_pixels=1568))(source)
        assert list(grid) == expected["video.video_grid_thw"][0].tolist()
        torch.testing.assert_close(rows, expected["video.pixel_values_videos"], rtol=0, atol=1e-5)
        assert seconds == 1.0


@given(st.integers(1, 7), st.integers(1, 3), st.integers(1, 3), st.sampled_from([(14, 2, 2), (4, 3, 1), (8, 1, 2)]))
@settings(deadline=None, max_examples=25)
def test_patches_equal_transformers(transformers_method, count, high, wide, sizes):
    patch, step, merge = sizes
    side = patch * merge
    frames = np.random.default_rng(count).integers(0, 256, (count, high * side, wide * side, 3), dtype=np.uint8)
    images = ImageProcessor(ImageConfig(patch, step, merge, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)))
    area = frames[0, ..., 0].size
    rows, grid, _ = VideoProcessor(images, VideoConfig(min_pixels=area, max_pixels=area, total_pixels=10**9))(frames)
    normal = (torch.from_numpy(frames).double() / 255 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.2, 0.3, 0.4])
    theirs = transformers_method["patchify"](None, normal.permute(0, 3, 1, 2)[None].contiguous(), patch, merge, step)
    assert grid == theirs[1:]
    torch.testing.assert_close(rows, theirs[0][0].float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "frames", "rate", "codec"),
    [("a.mp4", 50, 25, "libx264"), ("b.mkv", 33, 10, "libx264"), ("c.avi", 20, 5, "mpeg4"), ("d.mp4", 7, 30, "mpeg4")],
)
def test_files_show_the_frames_of_an_independent_decode(tmp_path, name, frames, rate, codec):
    path = write_video(tmp_path / name, frames, rate, codec=codec)
    whole = decode_all(path)
    assert len(whole) == frames
    count = explicit_count(frames, rate, 2.0, 4, 768)
    chosen = [round(number * (frames - 1) / (count - 1)) for number in range(count)]
    rows, grid, seconds = VideoProcessor(IMAGES)(str(path))
    height, width = smart_resize(48, 64, 28, 128 * 784, 768 * 784)
    assert grid == (count // 2, height // 14, width // 14)
    assert seconds == pytest.approx(2 / (count / frames * rate), rel=1e-12)
    resized = [Image.fromarray(whole[number]).resize((width, height), Image.Resampling.BICUBIC) for number in chosen]
    expected, _ = IMAGES.patches(np.stack([np.asarray(frame) for frame in resized]))
    assert torch.equal(rows, expected)


def test_options_of_one_video(tmp_path):
    path = write_video(tmp_path / "a.mp4", 40, 20)
    videos = VideoProcessor(IMAGES, TINY)
    assert [videos(path, options={"fps": fps})[1][0] for fps in (2, 4, 10, 1000)] == [2, 4, 10, 20]
    assert [videos(path, options={"fps": fps})[2] for fps in (2, 4, 10, 1000)] == [1.0, 0.5, 0.2, 0.1]
    assert videos(path, options={"frames": 6})[1:] == ((3, 4, 4), 2 / (6 / 40 * 20))
    assert videos(path, options={"max_frames": 6, "fps": 20})[1][0] == 3
    assert videos(path, options={"max_pixels": 784})[1] == (2, 2, 2)
    assert videos(path.read_bytes())[1] == videos(str(path))[1]
    nothing = dict.fromkeys(("fps", "frames", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels"))
    assert videos(path, options=nothing)[1:] == videos(path)[1:]
    for name in nothing:
        for value in (float("inf"), float("nan"), "2", True, [], -1, 0):
            with pytest.raises(ConfigError, match=rf"m\[0\]: videos\.{name}: .*; expected a (whole )?number from 1"):
                videos(path, "m[0]", {name: value})
    with pytest.raises(ConfigError, match=r"m\[0\]: option 'speed'; expected one of fps, frames"):
        videos(path, "m[0]", {"speed": 2})
    with pytest.raises(ConfigError, match=r"m\[0\]: videos.fps: 0; expected a number from 1e-6 to 1e6"):
        videos(path, "m[0]", {"fps": 0})
    with pytest.raises(ConfigError, match=r"m\[0\]: frames: 99; expected 2 to 40"):
        videos(path, "m[0]", {"frames": 99})


def test_lists_of_frames():
    frames = [Image.new("RGB", (56, 28), (number, 0, 0)) for number in range(5)]
    videos = VideoProcessor(IMAGES, TINY)
    rows, grid, seconds = videos(frames, options={"fps": 4})
    assert (grid, seconds) == ((3, 2, 4), 0.5)
    red = rows[:, :196] * 0.26862954 + 0.48145466, rows[:, 196:392] * 0.26862954 + 0.48145466
    shown = [round(float(half[step * 8].mean() * 255)) for step in range(3) for half in red]
    assert shown == [0, 1, 2, 3, 4, 4]
    with pytest.raises(ConfigError, match="frame 5 has 28x28 pixels, the first one 56x28"):
        videos([*frames, Image.new("RGB", (28, 28))])
    with pytest.raises(ConfigError, match=r"clip frame 1: image gone\.png cannot be read"):
        videos([frames[0], "gone.png"], "clip")
    for nothing in ([], None, 3):
        with pytest.raises(ConfigError, match="expected a video's file, its bytes or a list of frames"):
            videos(nothing)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": -1}, r"videos\.fps: -1; expected a number from 1e-6 to 1e6"),
        ({"fps": float("inf")}, r"videos\.fps: inf; expected a number from 1e-6 to 1e6"),
        ({"fps": None}, r"videos\.fps: None; expected a number"),
        ({"tokens_per_second": "2"}, r"videos\.tokens_per_second: '2'; expected a number"),
        ({"max_frames": 2.5}, r"videos\.max_frames: 2\.5; expected a whole number from 1"),
        ({"min_frames": True}, r"videos\.min_frames: True; expected a whole number from 1"),
        ({"min_frames": None}, r"videos\.min_frames: None; expected a whole number from 1"),
        ({"total_pixels": float("inf")}, r"videos\.total_pixels: inf; expected a whole number from 1"),
        ({"convention": "v1"}, r"videos\.convention: 'v1'; expected one of v457, v523"),
        ({"min_frames": 8, "max_frames": 4}, "min_frames and videos.max_frames: 8 and 4; expected min <= max"),
        ({"min_pixels": 8, "max_pixels": 4}, "min_pixels and videos.max_pixels: 8 and 4; expected min <= max"),
        ({"sampling": "random"}, "videos.sampling: 'random'; expected one of ends, steps"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        VideoConfig(**options)
