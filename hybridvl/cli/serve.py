"""`hybridvl serve`: a stream on a page, beside a model whose memory grows, with questions at any moment."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType

from hybridvl.checkpoints import load, open_checkpoint
from hybridvl.cli.arguments import Arguments
from hybridvl.cli.computing import DTYPES, runner_notes, runner_of, use_threads
from hybridvl.cli.replying import add_reply_flags, printable, require_output, sampling_of
from hybridvl.cli.serve_page import Note, PageText, free_port, launch, require_gradio
from hybridvl.cli.source_flags import add_source_flags, given_limits, opened_source, seeing_folder
from hybridvl.conversion import Conversion, prepare
from hybridvl.data.sources.opening import without_password
from hybridvl.inference.graphs import StepGraphs
from hybridvl.inference.processor import Processor
from hybridvl.inference.streaming import StreamingSession
from hybridvl.inference.streaming.showing import Showing
from hybridvl.inference.streaming.side_by_side import SideBySide
from hybridvl.inference.streaming.sides import Side, SideView
from hybridvl.layers.errors import ConfigError, within
from hybridvl.models.generation import check_request
from hybridvl.pattern import parse_pattern

_MADE = (
    "Made for comparison: attention layers of the checkpoint, and random ones in place of all others. Its times and "
    "memory are true; it is not asked."
)


def main(argv: Sequence[str]) -> int:
    """Serve the page until Ctrl-C or SIGTERM; returns 0. Mistakes are ConfigErrors."""
    options = _parser().parse_args(argv)
    require_output()
    port = free_port(options.host, options.port)
    folder = seeing_folder(options.checkpoint)
    check_request(options.max_new_tokens, 1)
    if options.baseline_tokens < 1:
        raise ConfigError(f"--baseline-tokens: {options.baseline_tokens}; expected a whole number of at least 1")
    use_threads(options, reading=True)
    processor = Processor.load(folder)
    showing = Showing(
        max_new_tokens=options.max_new_tokens,
        sampling=sampling_of(options, folder, processor),
        stops=options.stop,
        queue=options.queue,
        drop=options.drop or "never",
        realtime=options.realtime,
    )
    baseline = None if options.no_baseline else _baseline(options.baseline, folder)
    with opened_source(options, processor) as source:
        require_gradio()  # before models are loaded, which takes long
        if options.drop is None and source.live:
            showing = dataclasses.replace(showing, drop="oldest")
        sides, notes = _sides(options, folder, processor, baseline)
        stream = SideBySide(sides, source, partial(opened_source, options, processor), showing, options.loop)
        text = PageText(source=_shown_source(options.source), names=[side.name for side in sides], notes=notes)
        _serve(stream, text, options.host, port)
    if not options.quiet and sys.stderr is not None:
        told = [line for note in notes for line in note()[1:]]
        for line in [*map(_summary, stream.view.sides), *dict.fromkeys(told)]:
            print(line, file=sys.stderr)
    if stream.view.error and sys.stderr is not None:
        print(f"error: {stream.view.error}", file=sys.stderr)
    return 0


def _serve(stream: SideBySide, text: PageText, host: str, port: int) -> None:
    """Show the stream on the page until a signal asks for the end."""
    ending = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        ending.set()
        signal.signal(number, before[signal.Signals(number)])  # a second one ends the command at once

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    page = None
    try:
        page = launch(stream, text, host, port)
        stream.start()
        print(f"http://{host}:{port}/ shows {text.source}; Ctrl-C ends it", flush=True)
        while not ending.wait(0.2):  # not for ever at once: Python overlooks a signal just before a wait begins
            pass
    finally:
        stream.close()
        if page is not None:
            page.close(verbose=False)
        for number, handler in before.items():
            signal.signal(number, handler)


def _baseline(given: str | None, folder: Path) -> Path | Conversion:
    """The folder of a model, or the plan of one that is made of the checkpoint."""
    if given is not None and os.path.isdir(given):
        return seeing_folder(given)
    checkpoint = open_checkpoint(folder)
    config = checkpoint.config
    depth = len(parse_pattern(config.pattern, config.mixers).specs)
    with within("--baseline"):
        return prepare(checkpoint, f"full*{depth}" if given is None else given, "none")


def _sides(
    options: argparse.Namespace, folder: Path, processor: Processor, baseline: Path | Conversion | None
) -> tuple[list[Side], list[Note]]:
    """The models with their streams, and what should be known about each."""
    dtype = DTYPES.get(options.dtype)
    runner = runner_of(options, load(folder, device=options.device, dtype=dtype).eval())
    sides = [Side(name=runner.model.config.pattern, session=_session(options, runner, processor))]
    notes = [_note(options, runner, f"{options.checkpoint}: it answers questions.")]
    if isinstance(baseline, Path):
        other, own = load(baseline, device=options.device, dtype=dtype).eval(), Processor.load(baseline)
        about = f"{options.baseline}: it answers questions, too."
    elif baseline is not None:
        other, own, about = baseline.model(dtype=dtype).to(options.device), processor, _MADE
    else:
        return sides, notes
    name, runner = other.config.pattern, runner_of(options, other)
    notes.append(_note(options, runner, about))
    sides.append(
        Side(
            name=name if name != sides[0].name else f"{name} (baseline)",
            session=_session(options, runner, own),
            answers=isinstance(baseline, Path),
            most_tokens=options.baseline_tokens,
        )
    )
    return sides, notes


def _note(options: argparse.Namespace, runner: StepGraphs, about: str) -> Note:
    """What should be known about a model, and why it runs as it does, as far as that has shown."""
    return lambda: [about, *runner_notes(options, runner)]


def _session(options: argparse.Namespace, runner: StepGraphs, processor: Processor) -> StreamingSession:
    layout = options.layout or "video"
    limits = given_limits(options, processor, layout)
    return StreamingSession(runner.model, processor, layout, limits=limits, runner=runner)


def _shown_source(source: str) -> str:
    """Its name, for the page and the terminal."""
    return printable(without_password(source) if "://" in source else source)


def _summary(side: SideView) -> str:
    took = "" if side.milliseconds is None else f"{side.milliseconds:,.1f} ms a frame at the end, "
    return f"{side.name}: {side.frames:,} frames, {took}{side.tokens:,} tokens, state {side.state_bytes:,} bytes"


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="hybridvl serve",
        description="Show a stream on a page: the video, the time of a frame and the memory of the model beside one of "
        "full attention, and a box for questions.",
        epilog="example: hybridvl serve street.mp4 --checkpoint DIR --loop",
    )
    add_source_flags(parser)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a run folder, or a model folder with a vision tower")
    add("--loop", action="store_true", help="begin again when the source has ended; the stream goes on")
    group = parser.add_mutually_exclusive_group()
    compared = "what it is compared with: a model folder, or a pattern as deep as the model (default full*DEPTH)"
    group.add_argument("--baseline", metavar="DIR|PATTERN", help=compared)
    group.add_argument("--no-baseline", action="store_true", help="the model alone")
    add("--baseline-tokens", type=int, default=65_536, metavar="N", help="the baseline stops there (default 65536)")
    add("--host", default="127.0.0.1", help="address of the page (default 127.0.0.1: seen on this machine alone)")
    add("--port", type=int, default=7860, metavar="N", help="port of the page (default 7860; 0: any that is free)")
    add_reply_flags(parser)
    return parser
