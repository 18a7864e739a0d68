"""Tests of what open_image makes of files, bytes, PIL images and arrays: upright, 8 bits, alpha kept or refused."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from hybridvl.data.images import ImageConfig, ImageProcessor, open_image
from hybridvl.layers import ConfigError

NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 4), dtype=np.uint8)
PROCESSOR = ImageProcessor(ImageConfig(min_pixels=784, max_pixels=50000))


def encoded(image, kind="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def every_way(data, tmp_path):
    """The same picture as bytes, as a file by text and path, and opened by PIL."""
    (tmp_path / "picture").write_bytes(data)
    return data, str(tmp_path / "picture"), tmp_path / "picture", Image.open(io.BytesIO(data))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_pictures_are_upright(tmp_path, orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(NOISE[..., :3]), kind, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert (upright.size == (60, 40)) == (orientation < 5)
    for source in every_way(data, tmp_path):
        found = open_image(source)
        assert np.array_equal(np.asarray(found), np.asarray(upright))
        assert np.array_equal(np.asarray(open_image(found)), np.asarray(upright))  # not turned again


def test_rotated_pictures_are_those_of_transformers(tmp_path):
    from transformers.image_utils import load_image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(NOISE[..., :3]), "jpeg", exif=exif)
    published = Qwen2VLImageProcessorPil(size={"shortest_edge": 784, "longest_edge": 50000})
    for source in every_way(data, tmp_path):
        if isinstance(source, str | Image.Image):
            theirs = published(load_image(source), return_tensors="pt")
            rows, grid = PROCESSOR(source)
            assert theirs["image_grid_thw"].tolist() == [list(grid)] == [[1, 4, 2]]
            torch.testing.assert_close(rows, theirs["pixel_values"], rtol=0, atol=1e-5)


def test_an_orientation_that_says_nothing_is_none():
    for orientation in (0, 9, 65535):
        exif = Image.Exif()
        exif[0x0112] = orientation
        found = open_image(encoded(Image.fromarray(NOISE[..., :3]), exif=exif))
        assert np.array_equal(np.asarray(found), NOISE[..., :3])


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_seen_on_white(tmp_path, mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(NOISE).convert("P" if mode == "P" else mode)
    data = encoded(picture, exif=exif, **({"transparency": int(np.asarray(picture)[0, 0])} if mode == "P" else {}))
    layers = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGBA")).astype(np.float64)
    alpha = layers[..., 3:] / 255
    expected = layers[..., :3] * alpha + 255 * (1 - alpha)
    assert alpha.min() < 0.1
    for source in every_way(data, tmp_path):
        image = open_image(source)
        found = PROCESSOR.pixels(image, image.height, image.width)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1)


def test_grey_of_sixteen_bits_is_scaled(tmp_path):
    values = np.random.default_rng(1).integers(0, 65536, (40, 60))
    values[0, :2] = 0, 65535
    expected = np.round(values * 255 / 65535).astype(np.uint8)
    pictures = [
        Image.fromarray(values.astype(np.uint16)),
        Image.fromarray(values.astype(np.int32)),
        Image.frombytes("I;16B", (60, 40), values.astype(">u2").tobytes()),
    ]
    assert [picture.mode for picture in pictures] == ["I;16", "I", "I;16B"]
    sources = [*pictures, *every_way(encoded(pictures[0]), tmp_path), encoded(pictures[0], "tiff")]
    for source in sources:
        assert np.array_equal(np.asarray(open_image(source)), expected)
    rows, _ = PROCESSOR(pictures[0])
    torch.testing.assert_close(rows, PROCESSOR(expected)[0])


@pytest.mark.parametrize(
    "array", [np.full((4, 5), 70000, np.int32), np.full((4, 5), -1, np.int32), np.ones((4, 5), "f4")]
)
def test_values_of_no_known_range_are_refused(array):
    with pytest.raises(
        ConfigError, match=r"m\[0\]: image in memory has values from .* expected 8 bits a channel, or grey"
    ):
        open_image(Image.fromarray(array), "m[0]")


def test_arrays():
    for shape in ((40, 60), (40, 60, 1), (40, 60, 2), (40, 60, 3), (40, 60, 4)):
        array = NOISE[..., : shape[2]] if len(shape) == 3 else NOISE[..., 0]
        assert np.array_equal(np.asarray(open_image(array)).reshape(array.shape), array)
        assert PROCESSOR(array)[1] == (1, 2, 4)
    for bad in (
        NOISE.astype(np.float32),
        NOISE > 3,
        NOISE.astype(np.uint16),
        NOISE[:0],
        NOISE[:, :, :0],
        NOISE[0, 0],
        NOISE[None],
        np.zeros((4, 5, 5), np.uint8),
        np.array("text"),
    ):
        with pytest.raises(ConfigError, match=r"m\[0\]: array of .* expected uint8 \(H, W\) or \(H, W, C\)"):
            open_image(bad, "m[0]")


@pytest.mark.filterwarnings("ignore")
def test_damaged_metadata_and_pixels_are_read_or_refused():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    random = np.random.default_rng(2)
    for kind in ("jpeg", "webp", "png", "tiff", "gif", "bmp", "ppm"):
        whole = encoded(
            Image.fromarray(NOISE[..., :3]), kind, **({} if kind in ("gif", "bmp", "ppm") else {"exif": exif})
        )
        opened = 0
        for case in range(60):
            data = bytearray(whole)
            for place in random.integers(0, 100 if case % 2 else len(data), 1 + case % 5):
                data[place] = random.integers(256)
            try:
                opened += bool(open_image(bytes(data)))
            except ConfigError:
                continue
        assert opened < 60


def test_options_of_one_image():
    large = Image.fromarray(np.tile(NOISE[..., :3], (10, 10, 1)))  # 600 x 400
    assert PROCESSOR(large, options={"max_pixels": 10000})[1] == ImageProcessor(ImageConfig(max_pixels=10000))(large)[1]
    small = Image.fromarray(NOISE[..., :3])
    assert PROCESSOR(small, options={"min_pixels": 20000})[1] == ImageProcessor(ImageConfig(min_pixels=20000))(small)[1]
    assert PROCESSOR(small, options={"min_pixels": None, "max_pixels": None})[1] == PROCESSOR(small)[1]
    for options, message in (
        ({"resized_height": 28}, r"m\[0\]: option 'resized_height'; expected one of min_pixels, max_pixels"),
        ({"min_pixels": "28"}, r"m\[0\]: images\.min_pixels: '28'; expected a whole number"),
        ({"max_pixels": float("inf")}, r"m\[0\]: images\.max_pixels: inf; expected a whole number"),
        ({"max_pixels": 28}, r"m\[0\]: images\.min_pixels and images\.max_pixels: 784 and 28; expected 0 < min <= max"),
    ):
        with pytest.raises(ConfigError, match=message):
            PROCESSOR(small, "m[0]", options)
