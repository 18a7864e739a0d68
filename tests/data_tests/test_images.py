"""Tests of hybridvl.data.images against the recorded numbers of Qwen2-VL's processor and an explicit loop."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from hybridvl.data.images import ImageConfig, ImageProcessor, open_image, smart_resize
from hybridvl.layers import ConfigError

FOLDER = Path(__file__).parents[1] / "data" / "qwen2_5_vl_preproc"


@pytest.fixture(scope="module")
def recorded():
    return load_file(FOLDER / "inputs.safetensors"), load_file(FOLDER / "expected.safetensors")


@pytest.mark.parametrize("name", ["img0", "img1"])
def test_recorded_images(recorded, name):
    inputs, expected = recorded
    processor = ImageProcessor(ImageConfig(max_pixels=1003520))
    rows, grid = processor(inputs[f"{name}_u8_hwc"].numpy())
    assert list(grid) == expected[f"{name}.image_grid_thw"][0].tolist()
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, expected[f"{name}.pixel_values"], rtol=0, atol=1e-5)


def test_recorded_video(recorded):
    inputs, expected = recorded
    rows, grid = ImageProcessor(ImageConfig()).patches(inputs["video_u8_thwc"].numpy())
    assert list(grid) == expected["video.video_grid_thw"][0].tolist()
    torch.testing.assert_close(rows, expected["video.pixel_values_videos"], rtol=0, atol=1e-5)


def test_recorded_sizes(recorded):
    for height, width, low, high, new_height, new_width in recorded[1]["smart_resize.h_w_min_max_H_W"].tolist():
        assert smart_resize(height, width, 28, low, high) == (new_height, new_width)


@pytest.fixture(scope="module")
def published():
    """transformers' image processor, in the version that needs no torchvision."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil


@given(
    st.integers(4, 300),
    st.integers(4, 300),
    st.sampled_from([(3136, 12845056), (3136, 20000), (50000, 60000), (400, 3000)]),
    st.sampled_from([(14, 2, 2), (16, 1, 2), (7, 2, 3)]),
    st.sampled_from(["RGB", "L", "RGBA", "P"]),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=25)
def test_equals_transformers_image_processor(published, height, width, limits, sizes, mode, seed):
    patch, frames, merge = sizes
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    theirs = published(
        size={"shortest_edge": limits[0], "longest_edge": limits[1]},
        patch_size=patch,
        temporal_patch_size=frames,
        merge_size=merge,
    )(image, return_tensors="pt")
    rows, grid = ImageProcessor(ImageConfig(patch, frames, merge, *limits))(image)
    assert list(grid) == theirs["image_grid_thw"][0].tolist()
    torch.testing.assert_close(rows, theirs["pixel_values"], rtol=0, atol=1e-5)


@given(st.integers(1, 600), st.integers(1, 600), st.sampled_from([8, 14, 16, 28]))
def test_sizes_are_multiples_within_the_limits(height, width, factor):
    if max(height, width) > 200 * min(height, width):
        return
    low, high = 4 * factor**2, 64 * factor**2
    new_height, new_width = smart_resize(height, width, factor, low, high)
    assert new_height % factor == new_width % factor == 0
    assert new_height * new_width >= low
    if max(height, width) < 16 * min(height, width):
        assert new_height * new_width <= high


@given(
    st.integers(1, 7),
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([1, 3]),
)
@settings(deadline=None, max_examples=30)
def test_rows_are_in_merge_order_at_any_size(patch, frames, merge, high, wide, channels):
    config = ImageConfig(
        patch_size=patch, temporal_patch_size=frames, merge_size=merge, mean=(0.5,) * channels, std=(0.25,) * channels
    )
    height, width = high * patch * merge, wide * patch * merge
    pixels = np.random.default_rng(0).integers(0, 256, (1, height, width, channels), dtype=np.uint8)
    rows, grid = ImageProcessor(config).patches(pixels)
    assert grid == (1, high * merge, wide * merge)
    expected = []
    for block_y in range(high):
        for block_x in range(wide):
            for y in range(merge):
                for x in range(merge):
                    top, left = (block_y * merge + y) * patch, (block_x * merge + x) * patch
                    patch_pixels = pixels[0, top : top + patch, left : left + patch].astype(np.float64)
                    patch_pixels = ((patch_pixels / 255 - 0.5) / 0.25).transpose(2, 0, 1)
                    expected.append(np.repeat(patch_pixels[:, None], frames, axis=1).reshape(-1))
    np.testing.assert_allclose(rows.numpy(), np.array(expected), rtol=0, atol=1e-6)


def test_grey_and_colour_images_become_what_the_config_says():
    grey = Image.new("L", (32, 16), 51)
    config = ImageConfig(patch_size=8, temporal_patch_size=1, min_pixels=1, mean=(0.2,), std=(0.5,))
    rows, grid = ImageProcessor(config)(grey)
    assert (rows.shape, grid) == ((8, 64), (1, 2, 4))
    assert rows.abs().max() < 1e-7
    rows, _ = ImageProcessor(ImageConfig(patch_size=8, temporal_patch_size=2, min_pixels=1))(grey)
    assert rows.shape == (8, 3 * 2 * 64)


def test_default_limits_are_those_of_the_published_model():
    assert ImageConfig().pixel_limits == (3136, 12845056)


def test_a_truncated_file_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for suffix in ("png", "jpg"):
        path = tmp_path / f"cut.{suffix}"
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:1500])
        with pytest.raises(ConfigError, match=rf"row 3: image .*cut\.{suffix} cannot be read"):
            open_image(str(path), "row 3")


def test_unreadable_sources_are_named(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ConfigError, match=r"text\.png cannot be read"):
        open_image(tmp_path / "text.png")
    with pytest.raises(ConfigError, match=r"gone\.png cannot be read"):
        open_image(str(tmp_path / "gone.png"))
    with pytest.raises(ConfigError, match="image of 3 bytes cannot be read"):
        open_image(b"abc")
    with pytest.raises(ConfigError, match="NoneType; expected a PIL image"):
        open_image(None)


def test_bytes_and_files_give_the_same_image(tmp_path):
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    image.save(tmp_path / "a.png")
    buffer = io.BytesIO()
    image.save(buffer, "png")
    for source in (tmp_path / "a.png", buffer.getvalue(), np.asarray(image)):
        assert np.array_equal(np.asarray(open_image(source)), np.asarray(image))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 0}, r"images\.patch_size: 0; expected a whole number from 1"),
        ({"mean": (0.5, 0.5), "std": (1, 1)}, r"images\.mean and images\.std"),
        ({"std": (0, 1, 1)}, "std above 0"),
        ({"min_pixels": 100, "max_pixels": 10}, "expected 0 < min <= max"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        ImageConfig(**options)


def test_a_strip_is_refused():
    with pytest.raises(ConfigError, match="1000x4 pixels"):
        ImageProcessor(ImageConfig())(Image.new("RGB", (1000, 4)), "sample 1")


@pytest.mark.parametrize(
    ("frames", "told"),
    [(np.zeros((1, 28, 28, 4), np.uint8), "4 channels of uint8"), (np.zeros((1, 28, 28, 3)), "3 channels of float64")],
)
def test_frames_of_other_colours_or_numbers_are_refused(frames: np.ndarray, told: str) -> None:
    with pytest.raises(ValueError, match=rf"^frames: {told}; expected 3 of uint8$"):
        ImageProcessor(ImageConfig()).patches(frames)
