"""A pool: many streams through one model at once, each with a row of one state, coming and going as they like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from hybridvl.data.images import ImageSource
from hybridvl.inference.processor import Processor
from hybridvl.inference.replies import ReplyPiece, reply_pieces, with_stop
from hybridvl.inference.streaming.feeding import assembled, encode_steps, merge_size, run_feeds
from hybridvl.inference.streaming.session import StreamingSession
from hybridvl.inference.streaming.steps import FrameStep
from hybridvl.layers.errors import ConfigError
from hybridvl.models.decoder import ModelState
from hybridvl.models.generation import GenerationStep, check_request, generate
from hybridvl.models.sampling import Sampling
from hybridvl.models.vlm import VisionLanguageModel


class StreamPool:
    """Streams that share the calls of a model: frames of several go through its layers together.

    What a stream remembers is the row of one state, so that memory is what `capacity` streams need, however many come
    and go. A stream is known by the number of its row.

    Args:
        model: with a vision tower; in evaluation mode.
        processor: of the model's folder.
        capacity: most streams at a time.
        layout: of all streams, see `StreamingSession`, as the further arguments are.
        together: frames in a step.
        limits: smallest and largest area of a frame in pixels.

    Attributes:
        sessions: streams that are open, by number; what each is is told by its timeline, its state is empty.
        state: the model's state, a row for each.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        processor: Processor,
        capacity: int,
        layout: str = "video",
        together: int = 1,
        limits: tuple[float, float] | None = None,
    ) -> None:
        if type(capacity) is not int or capacity < 1:
            raise ConfigError(f"capacity: {capacity!r}; expected a whole number of streams of at least 1")
        self._blank = StreamingSession(model, processor, layout, together, limits)
        self.sessions: dict[int, StreamingSession] = {}
        self.state = model.init_state(capacity)

    @property
    def capacity(self) -> int:
        """Most streams at a time."""
        return len(self.state.length)

    def open(self, session: StreamingSession | None = None) -> int:
        """The number of a new stream, or of one that goes on from a session, such as one that was saved.

        Raises:
            ConfigError: there is no room, or the session is of another model.
        """
        session = self._blank if session is None else session
        if session.model is not self._blank.model:
            raise ConfigError("session: of another model; expected one of the pool's")
        free = next((row for row in range(self.capacity) if row not in self.sessions), None)
        if free is None:
            raise ConfigError(f"capacity: all {self.capacity} streams are taken; expected one to be closed first")
        self.state.put_rows(self._rows([free]), session.state)
        self.sessions[free] = session.fork(self._blank.state)
        return free

    def close(self, stream: int) -> None:
        """Give a stream's row back."""
        self._known([stream])
        del self.sessions[stream]

    def session(self, stream: int) -> StreamingSession:
        """A session that goes on from a stream by itself; the stream stays as it is."""
        self._known([stream])
        return self.sessions[stream].fork(self.state.take_rows(self._rows([stream])))

    def push(self, frames: Mapping[int, tuple[ImageSource, float | None]]) -> None:
        """Show a frame at its time to some of the streams, by number; see `StreamingSession.push`.

        Raises:
            ConfigError: no such stream, or a frame or a time that cannot be; then no stream has been shown anything.
        """
        self._known(frames)
        made: dict[int, list[FrameStep]] = {}
        before = {stream: self.sessions[stream].fork(self._blank.state) for stream in frames}
        try:
            for stream, (frame, time) in frames.items():
                session = self.sessions[stream]
                ready = session.steps.ready(frame, f"stream {stream}: frame {session.timeline.frames}")
                made[stream] = session.steps.take(ready, session.after_last if time is None else time)
            self._show(made)
        except BaseException:
            self.sessions.update(before)
            raise

    def say(self, stream: int, text: str) -> None:
        """Put a text into a stream; see `StreamingSession.say`."""
        self._known([stream])
        self.sessions[stream].timeline.copy().say(text)
        if text:
            self._show({stream: self.sessions[stream].steps.rest()})
            self.sessions[stream].timeline.say(text)

    def ask(
        self,
        questions: Mapping[int, str],
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        stops: Sequence[str] = (),
    ) -> Iterator[tuple[int, ReplyPiece]]:
        """The replies to questions to some of the streams at this moment, decoded together; the piece of a reply comes
        with the number of its stream. See `StreamingSession.ask`."""
        check_request(max_new_tokens, 1)
        self._known(questions)
        streams = list(questions)
        if not streams:
            return iter(())
        forks = {stream: self.session(stream) for stream in streams}
        feeds = []
        for stream, fork in forks.items():
            for step in fork.steps.rest():
                fork.push_step(step)
            feeds.append(fork.timeline.question(questions[stream]))
        state = self.state.take_rows(self._rows(streams))
        for row, fork in enumerate(forks.values()):
            state.put_rows(self._rows([row]), fork.state)
        model, processor = self._blank.model, self._blank.processor

        def steps() -> Iterator[GenerationStep]:
            embeds, positions, mask = assembled(model, feeds, [None] * len(feeds))
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(feed.before) for feed in feeds], batch_first=True)
            return generate(
                *(model, embeds, positions, mask, max_new_tokens, with_stop(sampling, processor), state),
                input_ids=ids.to(embeds.device),
                runner=self._blank.runner,
            )

        tokens = sum(feed.length for feed in feeds)
        pieces = reply_pieces(steps, processor, tokens, len(streams), stops)
        return ((streams[piece.row], piece) for piece in pieces)

    def _show(self, made: Mapping[int, Sequence[FrameStep]]) -> None:
        """Show steps, the first ones of all streams together, then the second ones."""
        merge = merge_size(self._blank.model)
        for number in range(max(map(len, made.values()), default=0)):
            steps = {stream: listed[number] for stream, listed in made.items() if number < len(listed)}
            features = encode_steps(self._blank.runner, list(steps.values()))
            timelines = {stream: self.sessions[stream].timeline.copy() for stream in steps}
            feeds = [
                timelines[stream].frame(step.grid[1] // merge, step.grid[2] // merge, step.time)
                for stream, step in steps.items()
            ]
            # On a copy: what breaks off within the layers has changed nothing.
            rows = self._rows(list(steps))
            state: ModelState = self.state.take_rows(rows)
            run_feeds(self._blank.runner, state, feeds, features)
            self.state.put_rows(rows, state)
            for stream, timeline in timelines.items():
                self.sessions[stream].timeline = timeline

    def _rows(self, streams: Sequence[int]) -> torch.Tensor:
        return torch.tensor(streams, dtype=torch.int64, device=self.state.length.device)

    def _known(self, streams: Sequence[int] | Mapping[int, object]) -> None:
        for stream in streams:
            if stream not in self.sessions:
                known = ", ".join(map(str, sorted(self.sessions))) or "none"
                raise ConfigError(f"stream: {stream!r:.80}; expected an open one: {known}")
