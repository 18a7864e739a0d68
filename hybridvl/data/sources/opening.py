"""Sources of frames by their names: files, folders of pictures, cameras and addresses on the network."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent import futures
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from hybridvl.data.sources.decoder import Decoder
from hybridvl.data.sources.folder import FolderSource
from hybridvl.data.sources.frames import FrameSource
from hybridvl.data.sources.interrupts import Interrupt
from hybridvl.data.sources.live import LiveConfig, LiveSource
from hybridvl.data.sources.times import LOOK_UP, Clock
from hybridvl.data.sources.video import VideoSource
from hybridvl.data.video_stream import Unreadable, require_file
from hybridvl.layers.errors import ConfigError

SCHEMES = ("rtsp", "rtsps", "http", "https")
FOLDER_RATE = 2.0
"""Pictures of a folder a second, where neither a rate nor fps is given."""

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def open_source(
    source: str | Path,
    fps: float | None = None,
    rate: float | None = None,
    live: LiveConfig | None = None,
    place: str = "source",
    clock: Clock | None = None,
    interrupt: Interrupt | None = None,
) -> FrameSource:
    """Open a video file, a folder of pictures, a camera (/dev/video0) or an address (rtsp://, rtsps://, http(s)://).

    An address of a video of known length is read like a file, all others are live: they are looked for again when they
    are lost. A camera's driver that stops without an error is waited for, as nothing can tell.

    Args:
        source: what to open.
        fps: frames to give a second, chosen by their times; None gives every frame.
        rate: pictures a second of a folder; None is fps, or 2.
        live: how cameras and addresses are read.
        place: what an error message calls it.
        clock: the wall clock of live sources.
        interrupt: another thread may end the opening by it, and closes the opened source with it.

    Raises:
        ConfigError: it is missing, empty, no video, or does not answer; or fps or the rate is none.
    """
    text = str(source)
    config, clock, interrupt = live or LiveConfig(), clock or Clock(), interrupt or Interrupt()
    address = _ADDRESS.match(text)
    if address is not None:
        scheme = address[1].lower()
        if scheme not in SCHEMES:
            known = ", ".join(SCHEMES)
            raise ConfigError(f"{place}: address {without_password(text)}; expected a file, or one of {known}")
        name = f"{place}: stream {without_password(text)}"
        transport = {"rtsp_transport": config.transport} if scheme.startswith("rtsp") else {}
        return _network(text, name, fps, config, transport, clock, interrupt)
    path = Path(source)
    if path.is_dir():
        rate = (fps or FOLDER_RATE) if rate is None else rate
        return FolderSource(path, f"{place}: folder {text}", fps, rate)
    if path.is_char_device() or text.startswith("/dev/video"):
        return _camera(path, f"{place}: camera {text}", fps, config, clock, interrupt)
    name = f"{place}: video {text}"
    return VideoSource(Decoder(require_file(path, name), name, interrupt), interrupt, name, fps)


def _network(
    address: str,
    name: str,
    fps: float | None,
    config: LiveConfig,
    options: dict[str, str],
    clock: Clock,
    interrupt: Interrupt,
) -> FrameSource:
    connect = partial(Decoder, address, name, interrupt, options={**options, **config.options}, timeout=config.timeout)
    decoder = _interruptible(connect, interrupt)
    if decoder.finite:
        return VideoSource(decoder, interrupt, name, fps)
    return LiveSource(decoder, connect, interrupt, name, fps, config, clock)


def _camera(
    path: Path, name: str, fps: float | None, config: LiveConfig, clock: Clock, interrupt: Interrupt
) -> FrameSource:
    if not path.exists():
        there = ", ".join(sorted(str(device) for device in Path("/dev").glob("video*"))) or "none"
        raise Unreadable(name, f"no such device; there are: {there}")
    connect = partial(
        Decoder, str(path), name, interrupt, format="v4l2", options=config.options, timeout=config.timeout
    )
    return LiveSource(_interruptible(connect, interrupt), connect, interrupt, name, fps, config, clock)


def _interruptible(connect: Callable[[], Decoder], interrupt: Interrupt) -> Decoder:
    """What is opened, by a thread: a wait within FFmpeg would keep Ctrl-C waiting, too."""
    with futures.ThreadPoolExecutor(1, "opening") as threads:
        opened = threads.submit(connect)
        try:
            while not futures.wait([opened], LOOK_UP).done:
                pass
            return opened.result()
        except BaseException:
            interrupt.set()
            raise


def without_password(address: str) -> str:
    """An address as it may be shown."""
    parts = urlsplit(address)
    return urlunsplit(parts._replace(netloc=re.sub(r":[^@:]*@", ":***@", parts.netloc)))
