"""Tests of hybridvl.data.video_file: every frame of whole files, and what is said of files that are not whole."""

import gc
import shutil
from multiprocessing import get_context

import av
import numpy as np
import pytest
from PIL import Image
from video_cases import decode_all, write_video

from hybridvl.data.video_file import VideoFile
from hybridvl.layers import ConfigError

FASTSTART = {"movflags": "faststart"}


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", None),
        ("b.mp4", "mpeg4", FASTSTART),
        ("c.mkv", "libx264", None),
        ("d.webm", "libvpx", None),
        ("e.avi", "mpeg4", None),
        ("f.ts", "libx264", None),
    ],
)
def test_whole_files(tmp_path, name, codec, options):
    path = write_video(tmp_path / name, 30, 15, codec=codec, options=options)
    whole = decode_all(path)
    for source in (path, str(path), path.read_bytes()):
        file = VideoFile(source)
        assert (file.frames, file.rate) == (30, 15.0)
        np.testing.assert_array_equal(np.stack(list(file.read([0, 3, 3, 17, 29]))), whole[[0, 3, 3, 17, 29]])
    assert list(VideoFile(path).read([])) == []


def test_frames_are_upright(tmp_path):
    whole = decode_all(write_video(tmp_path / "whole.mp4", 3, 5))
    one = 1 << 16
    # How x and y are shown: (x from x, y from x, x from y, y from y).
    for (a, b, c, d), upright in {
        (1, 0, 0, 1): whole,
        (0, 1, -1, 0): np.rot90(whole, -1, axes=(1, 2)),
        (-1, 0, 0, -1): np.rot90(whole, 2, axes=(1, 2)),
        (0, -1, 1, 0): np.rot90(whole, 1, axes=(1, 2)),
        (-1, 0, 0, 1): whole[:, :, ::-1],
        (1, 0, 0, -1): whole[:, ::-1],
        (0, 1, 1, 0): whole.transpose(0, 2, 1, 3),
        (0, -1, -1, 0): whole[:, ::-1, ::-1].transpose(0, 2, 1, 3),
    }.items():
        matrix = [value * one for value in (a, b, 0, c, d, 0, 0, 0, 1 << 14)]
        path = write_video(tmp_path / "turned.mp4", 3, 5, matrix=matrix)
        np.testing.assert_array_equal(np.stack(list(VideoFile(path).read([0, 1, 2]))), upright)


def test_a_rotation_is_the_one_that_pyav_names(tmp_path):
    for degrees, size in ((0, (64, 48)), (90, (48, 64)), (180, (64, 48)), (-90, (48, 64))):
        path = write_video(tmp_path / "turned.mp4", 3, 5, matrix=degrees)
        with av.open(str(path)) as container:
            frame = next(container.decode(video=0))
            assert frame.rotation % 360 == degrees % 360
            upright = np.rot90(frame.to_ndarray(format="rgb24"), degrees // 90)  # against the clock
        (found,) = VideoFile(path).read([0])
        assert found.shape[1::-1] == size
        np.testing.assert_array_equal(found, upright)


def test_a_forked_worker_can_free_what_its_parent_left(tmp_path):
    path = write_video(tmp_path / "a.mp4", 30, 15, size=(320, 240))
    gc.collect()
    gc.disable()
    try:
        assert len(list(VideoFile(path).read(range(30)))) == 30
        worker = get_context("fork").Process(target=gc.collect)
        worker.start()
        worker.join(20)
        code = worker.exitcode
        worker.kill()
    finally:
        gc.enable()
    assert code == 0


def test_sound_beside_the_video_does_not_matter(tmp_path):
    path = write_video(tmp_path / "a.mp4", 30, 15, audio=True)
    assert VideoFile(path).frames == 30


@pytest.mark.parametrize("name", ["a.mp4", "b.mkv", "c.webm", "d.avi", "fast.mp4"])
@pytest.mark.parametrize("part", [0.01, 0.3, 0.6])
def test_truncated_files_are_named(tmp_path, name, part):
    codec = {"c.webm": "libvpx", "d.avi": "mpeg4"}.get(name, "libx264")
    path = write_video(tmp_path / name, 100, 25, codec=codec, options=FASTSTART if name == "fast.mp4" else None)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    with pytest.raises(ConfigError, match=rf"row 3: video .*{name} cannot be read: "):
        VideoFile(path, "row 3")


def test_damaged_frames_are_named(tmp_path):
    path = write_video(tmp_path / "a.mp4", 100, 25, codec="mpeg4", options=FASTSTART, size=(320, 240))
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"clip: video .*a\.mp4 cannot be read: "):
        list(VideoFile(path, "clip").read(range(100)))


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "libx264"), ("b.ts", "libx264"), ("c.mp4", "mpeg4")])
def test_bytes_changed_at_random_are_read_or_refused(tmp_path, name, codec):
    whole = write_video(tmp_path / name, 20, 10, codec=codec).read_bytes()
    random, refused = np.random.default_rng(0), 0
    for case in range(40):
        data = bytearray(whole)
        for place in random.integers(0, len(data) if case % 2 else 600, 1 + case):
            data[place] = random.integers(256)
        try:
            file = VideoFile(bytes(data))
            assert len(list(file.read([0, file.frames - 1]))) == 2
        except ConfigError:
            refused += 1
    assert 0 < refused < 40


def test_titles_in_other_encodings_do_not_matter(tmp_path):
    path = write_video(tmp_path / "a.mkv", 10, 5, title="Sommer")
    data = path.read_bytes()
    assert b"Sommer" in data
    assert VideoFile(data.replace(b"Sommer", b"S\xf6mmer")).frames == 10


def test_what_is_no_video_is_named(tmp_path):
    image = Image.new("RGB", (64, 64))
    image.save(tmp_path / "picture.png")
    image.save(tmp_path / "picture.jpg")
    shutil.copy(tmp_path / "picture.jpg", tmp_path / "picture.mp4")
    (tmp_path / "text.txt").write_text("no video " * 100)
    (tmp_path / "text.mp4").write_text("no video " * 100)
    (tmp_path / "zeros.mp4").write_bytes(bytes(4096))
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        for packet in [*stream.encode(sound), *stream.encode()]:
            container.mux(packet)
    for file in sorted(tmp_path.iterdir()):
        with pytest.raises(ConfigError, match=rf"video .*{file.name} cannot be read: (it holds no video|Invalid data)"):
            VideoFile(file)


def test_missing_and_empty_files_are_named(tmp_path):
    (tmp_path / "empty.mp4").touch()
    for source, reason in (
        (tmp_path / "empty.mp4", r"empty\.mp4 cannot be read: it is empty"),
        (tmp_path / "gone.mp4", r"gone\.mp4 cannot be read: no such file"),
        (tmp_path, "cannot be read: no such file"),
        (b"", "video of 0 bytes cannot be read: it is empty"),
        (b"abc", "video of 3 bytes cannot be read: "),
    ):
        with pytest.raises(ConfigError, match=reason):
            VideoFile(source)
