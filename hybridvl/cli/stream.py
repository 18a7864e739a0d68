"""`hybridvl stream`: a video, a folder of pictures, a camera or a network stream shown to a model, and questions."""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

from hybridvl.checkpoints import load
from hybridvl.cli.arguments import Arguments
from hybridvl.cli.computing import DTYPES, runner_notes, runner_of, use_threads
from hybridvl.cli.output import writable
from hybridvl.cli.replying import (
    add_reply_flags,
    require_output,
    require_text,
    sampling_of,
    write_text,
)
from hybridvl.cli.source_flags import add_source_flags, given_limits, opened_source, seeing_folder
from hybridvl.cli.stream_view import StreamLog, StreamView, summary
from hybridvl.inference.graphs import StepGraphs
from hybridvl.inference.processor import Processor
from hybridvl.inference.streaming import StreamingSession
from hybridvl.inference.streaming.showing import BEFORE, Cue, Progress, Show, Showing, Unsaid, undivided
from hybridvl.layers.errors import ConfigError
from hybridvl.models.generation import check_request

_CUE = re.compile(r"(?P<time>start|end|[0-9]+(?:\.[0-9]+)?)s?:(?P<text>.*)", re.DOTALL)


def main(argv: Sequence[str]) -> int:
    """Show the source in `argv` to a model; returns the exit status."""
    options = _parser().parse_args(argv)
    with _sigterm_as_ctrl_c():
        _show(options)
    return 0


def _show(options: argparse.Namespace) -> None:
    require_output()
    cues = [
        *(_cue("--say", text, asks=False) for text in options.say),
        *(_cue("--ask", text, asks=True) for text in options.ask),
    ]
    folder = seeing_folder(options.checkpoint)
    check_request(options.max_new_tokens, 1)
    use_threads(options, reading=True)
    processor = Processor.load(folder)
    sampling = sampling_of(options, folder, processor)
    log = StreamLog(writable(options.log) if options.log else None)
    keep = writable(options.save_state) if options.save_state else None
    if options.max_frames is not None and options.max_frames < 1:
        raise ConfigError(f"--max-frames: {options.max_frames}; expected a whole number of at least 1")
    with opened_source(options, processor) as source:
        model = load(folder, device=options.device, dtype=DTYPES.get(options.dtype))
        runner = runner_of(options, model.eval())
        session = _session(options, runner, processor)
        showing = Showing(
            max_new_tokens=options.max_new_tokens,
            sampling=sampling,
            stops=options.stop,
            queue=options.queue,
            drop=options.drop or ("oldest" if source.live else "never"),
            realtime=options.realtime,
            most_frames=options.max_frames,
        )
        shown = Show(session, source, cues, showing)
        try:
            _watch(shown, log, options, runner)
        finally:
            # Also where the source broke off or Ctrl-C came: what has been shown is not lost.
            if keep is not None and session.whole and shown.progress.frames:
                with undivided():
                    session.save(keep)
                if not options.quiet and sys.stderr is not None:
                    print(f"state        {keep}", file=sys.stderr)


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """So that what ends a service or a job keeps the stream, too."""
    before = signal.getsignal(signal.SIGTERM)
    if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _session(options: argparse.Namespace, runner: StepGraphs, processor: Processor) -> StreamingSession:
    if options.load_state is not None:
        own = ("layout", "together", "min_pixels", "max_pixels")
        given = [name for name in own if getattr(options, name) is not None]
        if given:
            flag = given[0].replace("_", "-")
            raise ConfigError(f"--{flag}: given with --load-state; expected one of them: a stream goes on as it began")
        return StreamingSession.load(options.load_state, runner.model, processor, runner)
    layout = options.layout or "video"
    limits = given_limits(options, processor, layout)
    together = 1 if options.together is None else options.together
    return StreamingSession(runner.model, processor, layout, together, limits, runner)


def _watch(shown: Show, log: StreamLog, options: argparse.Namespace, runner: StepGraphs) -> None:
    """Print the replies as they are written and, on a terminal, how the stream goes; then what came of it."""
    with contextlib.closing(iter(shown)) as events, StreamView(options.quiet) as view:
        try:
            for event in events:
                if isinstance(event, Progress):
                    view.progress(event)
                    continue
                if isinstance(event, Unsaid):
                    view.note(f"warning: not said for {event.cue.time:g} s: the stream ended at {event.time:g} s")
                    continue
                if view.begins(event):
                    write_text(f"[{event.progress.time:.1f} s] {event.cue.text}\n")
                    if event.late:
                        view.note(
                            f"warning: asked for {event.cue.time:g} s: the stream ended at {event.progress.time:g} s"
                        )
                write_text(event.piece.text + ("\n" if event.piece.finish_reason else ""))
                log.reply(event)
        finally:
            log.end(shown.progress)
    for line in (summary(shown.progress), *runner_notes(options, runner)):
        view.note(line)


def _cue(flag: str, text: str, asks: bool) -> Cue:
    require_text(flag, text)
    found = _CUE.fullmatch(text)
    if found is None or not found["text"]:
        raise ConfigError(
            f'{flag}: {text!r:.80}; expected a time and a text, such as 12.5s:"TEXT", start:"TEXT" or end:"TEXT"'
        )
    moments = {"start": BEFORE, "end": None}
    time = moments[found["time"]] if found["time"] in moments else float(found["time"])
    return Cue(time, found["text"], asks)


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="hybridvl stream",
        description="Show a video of any length to a model, frame by frame, and ask about it at any moment.",
        epilog="example: hybridvl stream street.mp4 --checkpoint DIR --ask 12.5s:'Who is that?' --ask end:'What now?'",
    )
    add_source_flags(parser)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a run folder, or a model folder with a vision tower")
    add("--ask", action="append", default=[], metavar="T:TEXT", help="a question after T seconds ('start', 'end')")
    add(
        "--say",
        action="append",
        default=[],
        metavar="T:TEXT",
        help="a text after T seconds, which stays in the stream",
    )
    add("--together", type=int, metavar="N", help="frames in a step: 1 (default), or the tower's temporal patch")
    add("--max-frames", type=int, metavar="N", help="end after so many frames")
    add("--log", metavar="FILE", help="append questions, replies and rates, one JSON object a line")
    add("--save-state", metavar="FILE", help="keep the stream, also when it breaks off")
    add("--load-state", metavar="FILE", help="go on with a stream that was kept")
    add_reply_flags(parser)
    return parser
