"""Endless streams of frames at constant memory, with questions at any moment that leave no trace."""

from hybridvl.inference.streaming.pool import StreamPool
from hybridvl.inference.streaming.session import StreamingSession
from hybridvl.inference.streaming.steps import FrameStep, StepMaker
from hybridvl.inference.streaming.timeline import LAYOUTS

__all__ = ["LAYOUTS", "FrameStep", "StepMaker", "StreamPool", "StreamingSession"]
