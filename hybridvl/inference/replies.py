"""Replies of a model as text that grows, with the rates at which it is written."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from hybridvl.inference.processor import Processor
from hybridvl.inference.text_stream import TextStream
from hybridvl.models.generation import PREFILL_CHUNK, GenerationStep, StepRunner
from hybridvl.models.positions import row_lengths
from hybridvl.models.sampling import Sampling
from hybridvl.models.vlm import VisionLanguageModel


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast a reply is written; all rows of a batch together.

    Attributes:
        prompt_tokens: tokens of the prompts, padding not counted, visual tokens counted.
        prefill_seconds: from tokens and pixels to the first new token, the vision tower included.
        new_tokens: tokens decoded after the first one of each row, stop tokens included.
        decode_seconds: time in which these were decoded; what the reader of the text does is not counted.
        state_bytes: size of the model's state.
    """

    prompt_tokens: int
    prefill_seconds: float = 0.0
    new_tokens: int = 0
    decode_seconds: float = 0.0
    state_bytes: int = 0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Decoded tokens per second."""
        return self.new_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class ReplyPiece:
    """The next piece of one row's reply.

    row: which prompt of the batch. text: what is to be appended, whole characters. finish_reason: "" while the reply
    goes on, then "stop" (a stop token or a stop text) or "length" (max_new_tokens). rates: up to this piece.
    """

    row: int
    text: str
    finish_reason: str
    rates: Rates


def stream_replies(
    model: VisionLanguageModel,
    processor: Processor,
    inputs: Mapping[str, Tensor],
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    stops: Sequence[str] = (),
    chunk: int = PREFILL_CHUNK,
    runner: StepRunner | None = None,
) -> Iterator[ReplyPiece]:
    """The replies to prompts, piece by piece, as soon as each piece is certain; every row ends with a finish reason.

    inputs: of `Processor.prompt` or `Processor.batch`. sampling: None is greedy up to the tokenizer's end of turn;
    one without stop_ids ends there too. stops: texts that end a reply and are left out of it. chunk: prompt tokens
    per call of the layers. runner: runs the model's steps, see `generate`. Mistakes in the inputs are ConfigErrors.
    """
    sampling = with_stop(sampling, processor)
    lengths = row_lengths(inputs["input_ids"], inputs.get("attention_mask"), None)

    def steps() -> Iterator[GenerationStep]:
        device = model.lm_head_weight.device
        moved = {name: tensor.to(device) for name, tensor in inputs.items()}
        return model.steps(**moved, max_new_tokens=max_new_tokens, sampling=sampling, chunk=chunk, runner=runner)

    yield from reply_pieces(steps, processor, int(lengths.sum()), len(lengths), stops)


def with_stop(sampling: Sampling | None, processor: Processor) -> Sampling:
    """How tokens are chosen: greedily by default, and up to the tokenizer's end of turn if nothing else is said."""
    sampling = sampling or Sampling()
    return sampling if sampling.stop_ids else dataclasses.replace(sampling, stop_ids=(processor.stop_id,))


def reply_pieces(
    steps: Callable[[], Iterator[GenerationStep]],
    processor: Processor,
    prompt_tokens: int,
    rows: int,
    stops: Sequence[str] = (),
) -> Iterator[ReplyPiece]:
    """The replies of a generation, see `stream_replies`.

    steps: begins the generation, all that is to be counted as prefill included. prompt_tokens: of all `rows` together.
    """
    rates = Rates(prompt_tokens=prompt_tokens)
    streams = [TextStream(processor.text, stops) for _ in range(rows)]
    going = list(range(rows))
    for step, measured in _timed(steps, rates, going):
        rates = measured
        for row, (token, ended) in enumerate(zip(step.tokens.tolist(), step.finished.tolist(), strict=True)):
            if row not in going:
                continue
            text = streams[row].finish() if ended else streams[row].push(token)
            reason = "stop" if ended or streams[row].stopped else ""
            if reason:
                going.remove(row)
            if text or reason:
                yield ReplyPiece(row, text, reason, rates)
        if not going:
            return
    for row in going:
        yield ReplyPiece(row, streams[row].finish(), "length", rates)


def _timed(
    steps: Callable[[], Iterator[GenerationStep]], rates: Rates, going: list[int]
) -> Iterator[tuple[GenerationStep, Rates]]:
    """The steps of a generation with the rates so far; rows that are no longer `going` do not count."""
    begin = time.perf_counter()
    for number, step in enumerate(steps()):
        step.tokens.tolist()  # waits for the device
        seconds, size = time.perf_counter() - begin, step.state.nbytes
        if number == 0:
            rates = dataclasses.replace(rates, prefill_seconds=seconds, state_bytes=size)
        else:
            rates = dataclasses.replace(
                rates,
                new_tokens=rates.new_tokens + len(going),
                decode_seconds=rates.decode_seconds + seconds,
                state_bytes=size,
            )
        yield step, rates
        begin = time.perf_counter()
