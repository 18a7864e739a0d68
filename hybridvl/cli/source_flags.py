"""What commands that show a stream share: flags of the source and of its frames, and what they say."""

from __future__ import annotations

import argparse
from pathlib import Path

from hybridvl.checkpoints import read_config
from hybridvl.cli.replying import model_folder
from hybridvl.data.sources import FrameSource, LiveConfig, open_source
from hybridvl.data.sources.interrupts import Interrupt
from hybridvl.data.sources.live import TRANSPORTS
from hybridvl.data.sources.prefetch import DROPS
from hybridvl.data.video import VideoProcessor
from hybridvl.inference.processor import Processor
from hybridvl.inference.streaming import LAYOUTS
from hybridvl.inference.streaming.steps import frame_limits
from hybridvl.layers.errors import ConfigError


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    """SOURCE, and how it is read and shown; see `opened_source` and `given_limits`."""
    add = parser.add_argument
    add("source", metavar="SOURCE", help="video file, folder of pictures, camera (/dev/video0), rtsp:// or http(s)://")
    add("--fps", type=float, metavar="X", help="frames a second that are shown (default: the model's; 0: all)")
    add("--layout", choices=LAYOUTS, help="frames as one growing video (default), or each as an image")
    add("--min-pixels", type=int, metavar="N", help="enlarge smaller frames to this area")
    add("--max-pixels", type=int, metavar="N", help="reduce larger frames to this area")
    add("--drop", choices=DROPS, help="with a slow model: wait (default of files), or skip the oldest (cameras)")
    add("--queue", type=int, default=4, metavar="N", help="frames made ready ahead (default 4)")
    add("--realtime", action="store_true", help="show a file no faster than it plays")
    add("--transport", choices=TRANSPORTS, default="tcp", help="how rtsp streams are carried (default tcp)")
    add("--timeout", type=float, default=10.0, metavar="S", help="a live stream silent for so long is lost (10)")
    add("--tries", type=int, default=5, metavar="N", help="how often a lost one is looked for (default 5)")


def seeing_folder(path: str) -> Path:
    """The folder of a model that can look at frames; ConfigError if it is none."""
    folder = model_folder(path)
    if read_config(folder).vision is None:
        raise ConfigError(f"{path}: a model without a vision tower; expected one that can look at frames")
    return folder


def opened_source(options: argparse.Namespace, processor: Processor, interrupt: Interrupt | None = None) -> FrameSource:
    """The source that the flags name; ConfigError if it cannot be opened, or if there is to be no queue.

    interrupt: another thread may end the opening by it.
    """
    if options.queue < 1:
        raise ConfigError(f"--queue: {options.queue}; expected a whole number of at least 1")
    videos = processor.videos or VideoProcessor(processor.images)
    fps = videos.config.fps if options.fps is None else options.fps
    live = LiveConfig(timeout=options.timeout, tries=options.tries, transport=options.transport)
    return open_source(options.source, fps or None, live=live, place="SOURCE", interrupt=interrupt)


def given_limits(options: argparse.Namespace, processor: Processor, layout: str) -> tuple[float, float]:
    """Smallest and largest area of a frame in pixels."""
    videos = processor.videos or VideoProcessor(processor.images)
    low, high = frame_limits(processor.images, videos, layout)
    if options.min_pixels is None and options.max_pixels is None:
        return low, high
    # Where one limit is given beyond the other's default, the default gives way.
    return (
        min(low, options.max_pixels) if options.min_pixels is None else options.min_pixels,
        max(high, options.min_pixels) if options.max_pixels is None else options.max_pixels,
    )
