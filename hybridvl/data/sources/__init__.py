"""Sources of frames for streams without end: files, folders, cameras and addresses, read one frame after another."""

from __future__ import annotations

from hybridvl.data.sources.frames import FrameSource, TimedFrame
from hybridvl.data.sources.live import LiveConfig
from hybridvl.data.sources.opening import open_source
from hybridvl.data.sources.prefetch import Prefetcher

__all__ = ["FrameSource", "LiveConfig", "Prefetcher", "TimedFrame", "open_source"]
