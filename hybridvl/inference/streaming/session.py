"""A session: one endless stream of frames through a model, and questions that are answered on forks of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hybridvl.data.images import ImageSource
from hybridvl.data.video import VideoProcessor
from hybridvl.inference.graphs import StepGraphs
from hybridvl.inference.processor import Processor
from hybridvl.inference.replies import ReplyPiece, reply_pieces, with_stop
from hybridvl.inference.streaming.feeding import assembled, encode_steps, merge_size, run_feeds
from hybridvl.inference.streaming.saved import SavedStream, read_stream, write_stream
from hybridvl.inference.streaming.steps import FrameStep, StepMaker, frame_limits
from hybridvl.inference.streaming.timeline import Feed, Timeline
from hybridvl.layers.errors import ConfigError
from hybridvl.models.decoder import ModelState
from hybridvl.models.generation import GenerationStep, StepRunner, check_request, generate
from hybridvl.models.sampling import Sampling
from hybridvl.models.vlm import VisionLanguageModel


class StreamingSession:
    """Frames go in for ever, and questions may come at any moment; a question works on a copy of the state.

    The stream is a conversation whose user is still showing frames, see `Timeline`. What it remembers is the model's
    state: of constant size where no layer is full attention.

    Args:
        model: with a vision tower; in evaluation mode.
        processor: of the model's folder.
        layout: "video" shows all frames between two texts as one growing video, as InfiniteVL does; "images" shows each
            as an image, as models that were trained on frames between texts know them.
        together: frames in a step, see `StepMaker`.
        limits: smallest and largest area of a frame in pixels; None: the processor's.
        runner: runs the model's steps; None: `StepGraphs`, which records them on a GPU.

    Attributes:
        timeline: which tokens came when.
        state: the model's state; what waits in the timeline is not in it yet.
        steps: makes frames ready; a thread that runs ahead takes a copy.

    Raises:
        ConfigError: a model without a vision tower, or a setting that is none.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        processor: Processor,
        layout: str = "video",
        together: int = 1,
        limits: tuple[float, float] | None = None,
        runner: StepRunner | None = None,
    ) -> None:
        if model.visual is None:
            raise ConfigError("model: it has no vision tower; expected one that can look at frames")
        self.model = model
        self.runner = StepGraphs(model) if runner is None else runner
        self.processor = processor
        self.timeline = Timeline.opened(processor.chat, layout, model.config.tokens_per_second)
        videos = processor.videos or VideoProcessor(processor.images)
        limits = frame_limits(processor.images, videos, layout) if limits is None else limits
        self.steps = StepMaker(processor.images, limits, together)
        self.state = model.init_state(1)
        self._whole = True
        self._fps = videos.config.fps

    @property
    def state_bytes(self) -> int:
        """Bytes of the model's state."""
        return self.state.nbytes

    @property
    def after_last(self) -> float:
        """The time of the next frame if it comes at the rate of the processor's videos; 0 for the first."""
        return 0.0 if self.steps.last is None else self.steps.last + 1 / self._fps

    @property
    def whole(self) -> bool:
        """Whether the state is that of all frames that were shown: an error within the layers leaves it torn."""
        return self._whole

    def push(self, frame: ImageSource, time: float | None = None) -> None:
        """Show a frame at `time` seconds; None: one frame later than the last, at the rate of the processor's videos.

        Raises:
            ConfigError: the frame cannot be read, or its time is before the last frame's.
        """
        time = self.after_last if time is None else time
        for step in self.steps.take(self.steps.ready(frame, f"frame {self.timeline.frames}"), time):
            self.push_step(step)

    def push_step(self, step: FrameStep) -> None:
        """Show frames that were made ready elsewhere."""
        self.push_features(encode_steps(self.runner, [step])[0], step)

    def push_features(self, features: Tensor, step: FrameStep) -> None:
        """Show what the vision tower has made of a step: features (tokens, D)."""
        self._require_whole()
        merge, timeline = merge_size(self.model), self.timeline.copy()
        feed = timeline.frame(step.grid[1] // merge, step.grid[2] // merge, step.time)
        self._whole = False
        run_feeds(self.runner, self.state, [feed], [features])
        self.timeline, self._whole = timeline, True

    def say(self, text: str) -> None:
        """Put a text into the stream, where it stays, unlike a question; ConfigError if it is none."""
        self.timeline.copy().say(text)
        if text:
            self._show_rest()
            self.timeline.say(text)

    def ask(
        self,
        question: str,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        stops: Sequence[str] = (),
    ) -> Iterator[ReplyPiece]:
        """The reply to a question at this moment, piece by piece; the stream is left as it is, and may go on meanwhile.

        sampling: None is greedy up to the end of the turn; a repetition penalty counts the question's tokens. stops:
        texts that end a reply. ConfigErrors are raised here, not at the first piece.
        """
        check_request(max_new_tokens, 1)
        self._require_whole()
        fork = self.fork(self.runner.fork(self.state))
        fork._show_rest()
        feed = fork.timeline.question(question)
        return fork._reply(feed, max_new_tokens, with_stop(sampling, self.processor), stops)

    def fork(self, state: ModelState | None = None) -> StreamingSession:
        """A session that goes on from here by itself; model and processor are shared.

        state: its own from now on, where the state of this stream lies elsewhere; None: a copy of this session's.
        """
        made = copy.copy(self)
        made.timeline, made.steps = self.timeline.copy(), self.steps.copy()
        made.state = self.state.clone() if state is None else state
        return made

    def reset(self) -> None:
        """Begin anew, with the memory that is there."""
        self.timeline = Timeline.opened(self.processor.chat, self.timeline.layout, self.timeline.rate)
        self.steps = StepMaker(self.steps.images, self.steps.limits, self.steps.together)
        self.state.reset()
        self._whole = True

    def save(self, path: str | Path) -> None:
        """Write the stream into a safetensors file, from which `load` goes on bit for bit.

        Raises:
            ConfigError: the file cannot be written, or the state is not whole.
        """
        self._require_whole()
        write_stream(Path(path), self.model, SavedStream(self.timeline, self.steps, self.state))

    @classmethod
    def load(
        cls, path: str | Path, model: VisionLanguageModel, processor: Processor, runner: StepRunner | None = None
    ) -> StreamingSession:
        """The session that `save` wrote; runner: as of the class.

        Raises:
            ConfigError: the file is missing, damaged, of another version or of another checkpoint.
        """
        saved = read_stream(Path(path), model, processor)
        made = cls(model, processor, saved.timeline.layout, saved.steps.together, saved.steps.limits, runner)
        made.timeline, made.steps, made.state = saved.timeline, saved.steps, saved.state
        return made

    def _require_whole(self) -> None:
        if not self._whole:
            raise ConfigError("the stream: a frame broke off within the layers; expected reset, or one that was saved")

    def _show_rest(self) -> None:
        """A step that is not whole yet is shown with its last frame repeated, before anything else is said."""
        for step in self.steps.rest():
            self.push_step(step)

    def _reply(self, feed: Feed, max_new_tokens: int, sampling: Sampling, stops: Sequence[str]) -> Iterator[ReplyPiece]:
        def steps() -> Iterator[GenerationStep]:
            embeds, positions, _ = assembled(self.model, [feed], [None])
            asked = torch.tensor([feed.before], device=embeds.device)
            return generate(
                *(self.model, embeds, positions, None, max_new_tokens, sampling, self.state),
                input_ids=asked,
                runner=self.runner,
            )

        return reply_pieces(steps, self.processor, feed.length, 1, stops)
