"""Tests of hybridvl.data.sources with files and folders: every frame and its time, and what is said of damage."""

import re
import shutil
import threading
import weakref

import av
import numpy as np
import pytest
from PIL import Image
from video_cases import decode_all, write_timed, write_video

from hybridvl.data.sources import open_source
from hybridvl.layers import ConfigError

FASTSTART = {"movflags": "faststart"}


def read(path, fps=None):
    """All frames (F, H, W, 3) and their times."""
    with open_source(path, fps) as source:
        frames = list(source)
    assert all(frame.pixels.dtype == np.uint8 for frame in frames)
    return np.stack([frame.pixels for frame in frames]), [frame.time for frame in frames]


@pytest.mark.parametrize(
    ("name", "codec", "options", "size"),
    [
        ("a.mp4", "libx264", None, (64, 48)),
        ("b.mp4", "mpeg4", FASTSTART, (64, 48)),
        ("c.mkv", "libx264", None, (67, 49)),
        ("d.webm", "libvpx-vp9", None, (64, 48)),
        ("e.avi", "mpeg4", None, (64, 48)),
        ("f.ts", "libx264", None, (64, 48)),
        ("g:1.mov", "libx264", None, (64, 48)),
    ],
)
def test_every_frame_of_a_file_with_its_time(tmp_path, name, codec, options, size):
    path = tmp_path / name
    if size[0] % 2:  # Codecs write such sizes with other colours.
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=15, options={"qp": "0"})
            stream.width, stream.height, stream.pix_fmt = *size, "yuv444p"
            for number in range(24):
                pixels = np.full((size[1], size[0], 3), 9 * number, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
    else:
        write_video(f"file:{path}", 24, 15, size=size, codec=codec, options=options, audio=name in ("a.mp4", "f.ts"))
    pixels, times = read(path)
    np.testing.assert_array_equal(pixels, decode_all(f"file:{path}"))
    assert pixels.shape == (24, size[1], size[0], 3)
    np.testing.assert_allclose(times, np.arange(24) / 15, atol=0.00101)
    np.testing.assert_array_equal(read(path, 5)[0], pixels[::3])


@pytest.mark.parametrize("name", ["a.mp4", "b.mkv", "c.ts"])
@pytest.mark.parametrize("start", [0, 5000])
def test_uneven_times_a_late_start_and_frames_out_of_order(tmp_path, name, start):
    steps = [0, 40, 40, 200, 30, 500, 33, 34, 1000, 40, 40, 41, 7, 250, 250, 900]
    times = np.cumsum(steps)
    path = write_timed(tmp_path / name, (times + start).tolist(), options={"bf": "3", "b-adapt": "0"})
    with av.open(str(path)) as container:
        assert av.video.frame.PictureType.B in [frame.pict_type for frame in container.decode(video=0)]
    pixels, found = read(path)
    np.testing.assert_array_equal(pixels, decode_all(path))
    np.testing.assert_allclose(found, times / 1000, atol=1e-9)
    # Of each half second the first frame, but for 2.005, which comes too soon after 1.877.
    pixels, found = read(path, 2)
    assert found == pytest.approx([0.0, 0.81, 1.877, 2.255, 2.505, 3.405])
    np.testing.assert_array_equal(pixels, decode_all(path)[np.isin(times, np.round(np.array(found) * 1000))])


def test_a_cover_picture_before_the_video_is_passed_over(tmp_path):
    path = write_timed(tmp_path / "a.mp4", range(0, 800, 100), cover=True)
    with av.open(str(path)) as container:
        covers = [bool(stream.disposition & av.stream.Disposition.attached_pic) for stream in container.streams.video]
        assert sorted(covers) == [False, True]
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=covers.index(False))]
    pixels, times = read(path)
    np.testing.assert_array_equal(pixels, shown)
    np.testing.assert_allclose(times, np.arange(8) / 10)


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_frames_are_upright(tmp_path, degrees):
    path = write_video(tmp_path / "turned.mp4", 4, 5, matrix=degrees)
    np.testing.assert_array_equal(read(path)[0], np.rot90(decode_all(path), degrees // 90, axes=(1, 2)))


def test_frames_may_change_their_size_and_the_clock_may_begin_anew(tmp_path):
    first, second = write_video(tmp_path / "a.ts", 10, 5), write_video(tmp_path / "b.ts", 6, 5, size=(96, 80))
    (tmp_path / "both.ts").write_bytes(first.read_bytes() + second.read_bytes())
    with open_source(tmp_path / "both.ts") as source:
        frames = list(source)
    assert [frame.pixels.shape for frame in frames] == [(48, 64, 3)] * 10 + [(80, 96, 3)] * 6
    for frame, shown in zip(frames, [*decode_all(first), *decode_all(second)], strict=True):
        np.testing.assert_array_equal(frame.pixels, shown)
    np.testing.assert_allclose([frame.time for frame in frames], np.arange(16) / 5)


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("b.mkv", "libx264"), ("c.webm", "libvpx")])
@pytest.mark.parametrize("part", [0.6, 0.65, 0.7])
def test_a_file_that_is_cut_gives_its_frames_and_then_an_error(tmp_path, name, codec, part):
    path = write_video(tmp_path / name, 60, 15, codec=codec, options=FASTSTART if name == "a.mp4" else None)
    whole = decode_all(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    frames = []
    with (
        pytest.raises(
            ConfigError, match=rf"clip: video .*{name} cannot be read on after .*: it is truncated"
        ) as caught,
        open_source(path, place="clip") as source,
    ):
        frames.extend(source)
    assert 0 < len(frames) < 45
    np.testing.assert_array_equal([frame.pixels for frame in frames], whole[: len(frames)])
    count, second = re.search(r"after (\d+) frames, at second ([\d.]+)", str(caught.value)).groups()
    assert (int(count), float(second)) == (len(frames), pytest.approx(frames[-1].time, abs=0.006))


def test_a_damaged_file_gives_the_frames_before_the_damage(tmp_path):
    path = write_video(tmp_path / "a.mp4", 60, 15, codec="mpeg4", options=FASTSTART, size=(320, 240))
    whole, data = decode_all(path), bytearray(path.read_bytes())
    data[len(data) * 2 // 3 :] = bytes(len(data) - len(data) * 2 // 3)
    path.write_bytes(data)
    frames = []
    with pytest.raises(ConfigError, match=r"a\.mp4 cannot be read on after \d+ frames, at second"):  # noqa: PT012
        for frame in open_source(path):
            frames.append(frame)
    assert 10 < len(frames) < 60
    np.testing.assert_array_equal([frame.pixels for frame in frames], whole[: len(frames)])


def test_what_is_no_source_is_refused_at_opening(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "picture.png")
    shutil.copy(tmp_path / "picture.png", tmp_path / "picture.mp4")
    (tmp_path / "text.txt").write_text("no video " * 100)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "nothing").mkdir()
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux([*stream.encode(sound), *stream.encode()])
    for name, reason in {
        "picture.png": "it holds no video",
        "picture.mp4": "it holds no video",
        "text.txt": "it holds no video",
        "sound.mp4": "it holds no video",
        "empty.mp4": "it is empty",
        "gone.mp4": "no such file",
        "nothing": "it holds no pictures",
    }.items():
        with pytest.raises(ConfigError, match=rf"eyes: (video|folder) .*{name} cannot be read: {reason}"):
            open_source(tmp_path / name, place="eyes")
    for fps in (0, -1, float("nan"), True, "2"):
        with pytest.raises(ConfigError, match=r"fps: .*; expected a number from"):
            open_source(write_video(tmp_path / "a.mp4", 3), fps)
    with pytest.raises(ConfigError, match="source: address gopher://x; expected a file, or one of rtsp,"):
        open_source("gopher://x")
    with pytest.raises(ConfigError, match=r"source: camera /dev/video-none cannot be read: no such device; there are:"):
        open_source("/dev/video-none")


def write_pictures(folder):
    colours = {f"{number}.png": (number, 2 * number, 255 - number) for number in (1, 2, 9, 10, 100)}
    for name, colour in colours.items():
        Image.new("RGB", (8, 6), colour).save(folder / name)
    return colours


def test_pictures_of_a_folder_in_natural_order(tmp_path):
    colours = write_pictures(tmp_path)
    (tmp_path / ".hidden.png").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "3.png").mkdir()
    for fps, rate, seconds in ((None, None, 0.5), (None, 10, 0.1), (4, None, 0.25), (4, 4, 0.25)):
        with open_source(str(tmp_path), fps, rate=rate) as source:
            frames = list(source)
        assert [tuple(frame.pixels[0, 0]) for frame in frames] == list(colours.values())
        assert [frame.time for frame in frames] == pytest.approx([number * seconds for number in range(5)])
    with open_source(tmp_path, 2, rate=4) as source:
        assert [frame.pixels[0, 0, 0] for frame in source] == [1, 9, 100]
    with pytest.raises(ConfigError, match=r"rate: 0; expected a number"):
        open_source(tmp_path, rate=0)


def test_pictures_are_upright_and_opaque(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "1.PNG", exif=turned)
    Image.new("RGBA", (4, 4), (200, 0, 0, 0)).save(tmp_path / "2.png")
    Image.fromarray(np.full((5, 5), 77, np.uint8)).save(tmp_path / "3.jpg", quality=100)
    first, second, third = open_source(tmp_path)
    np.testing.assert_array_equal(first.pixels, np.rot90(pixels, -1))
    np.testing.assert_array_equal(second.pixels, np.full((4, 4, 3), 255))
    np.testing.assert_array_equal(third.pixels, np.full((5, 5, 3), 77))


def test_a_damaged_picture_is_named_after_those_before_it(tmp_path):
    write_pictures(tmp_path)
    (tmp_path / "9.png").write_bytes((tmp_path / "9.png").read_bytes()[:40])
    frames = []
    with pytest.raises(ConfigError, match=r"9\.png cannot be read: .*\(after 2 pictures, at second 1\.00\)"):
        frames.extend(open_source(tmp_path))
    assert len(frames) == 2


def test_frames_are_made_when_they_are_asked_for_and_not_kept(tmp_path):
    path = write_video(tmp_path / "a.mp4", 60, 8)
    given = []
    with open_source(path) as source:
        for frame in source:
            given.append(weakref.ref(frame.pixels))
            assert sum(pixels() is not None for pixels in given) <= 2
    assert len(given) == 60


def test_a_source_is_read_once_and_closed_at_any_moment(tmp_path):
    path = write_video(tmp_path / "a.mp4", 24, 8)
    with open_source(path) as source:
        for frame in source:
            if frame.time > 1:
                break
        with pytest.raises(RuntimeError, match="was read or closed already"):
            iter(source)
    source.close()
    unread = open_source(path)
    unread.close()
    with pytest.raises(RuntimeError, match="was read or closed already"):
        iter(unread)
    source = open_source(path)
    frames = iter(source)
    next(frames)
    closer = threading.Thread(target=source.close)
    closer.start()
    closer.join()
    assert list(frames) == []
    assert (source.live, source.reconnects, source.damaged) == (False, 0, 0)
