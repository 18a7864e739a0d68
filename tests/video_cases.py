"""What the tests of videos share: small video files made with PyAV, and an explicit way to decode them."""

from fractions import Fraction

import av
import numpy as np
from PIL import Image


def write_video(
    path, frames=24, rate=8, size=(64, 48), codec="libx264", options=None, audio=False, title=None, matrix=None
):
    """A file whose frame n shows a bar at column n and a brightness that grows with n; returns the path.

    matrix: FFmpeg's display matrix of nine numbers, or degrees against the clock.
    """
    width, height = size
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if isinstance(matrix, int):
            stream.set_display_rotation(matrix)
        elif matrix is not None:
            stream.set_display_matrix(matrix)
        if title is not None:
            container.metadata["title"] = title
        if audio:
            container.add_stream("aac", rate=8000)
        for number in range(frames):
            pixels = np.full((height, width, 3), 8 * number % 256, dtype=np.uint8)
            pixels[:, 2 * number % width] = 255
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def write_timed(path, times, codec="libx264", options=None, size=(64, 48), cover=False):
    """A file whose frame n is shown at times[n] milliseconds; returns the path."""
    with av.open(str(path), "w") as container:
        if cover:
            picture = container.add_stream("mjpeg")
            picture.width, picture.height, picture.pix_fmt = 32, 32, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
        stream = container.add_stream(codec, rate=30, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        if cover:
            container.mux(picture.encode(av.VideoFrame.from_image(Image.new("RGB", (32, 32), "red"))))
        for number, time in enumerate(times):
            pixels = np.full((size[1], size[0], 3), 8 * number % 256, dtype=np.uint8)
            pixels[:, 2 * number % size[0]] = 255
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def decode_all(path):
    """Every frame of a file as (F, H, W, 3) uint8, by way of PIL and one thread."""
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "NONE"
        return np.stack([np.asarray(frame.to_image()) for frame in container.decode(video=0)])
