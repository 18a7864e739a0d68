"""The page of `hybridvl serve`: what gradio shows, and what its buttons and its question box do."""

from __future__ import annotations

import dataclasses
import importlib
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import pandas as pd

from hybridvl.cli.serve_html import (
    COLOURS,
    CSS,
    MEGA,
    Exchange,
    frame_html,
    head_html,
    sides_html,
    talk_html,
)
from hybridvl.inference.streaming.side_by_side import SideBySide, View
from hybridvl.layers.errors import ConfigError

_SECONDS = 0.4  # between two looks at the stream
_PLOT_SECONDS = 1.0
_KEPT = 30  # questions that a tab shows
_REPLIES = 4  # that are written at a time
_CROPPED = 1.5  # times what 95 of 100 points stay below: a single spike is cut off there


Note = Callable[[], list[str]]
"""What should be known about a model now, a sentence each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageText:
    """What the page says.

    source: what is shown. names: of the models. notes: what should be known about each.
    """

    source: str
    names: Sequence[str]
    notes: Sequence[Note]


def require_gradio() -> Any:
    """The module gradio, which sends nothing to anyone; ConfigError if it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        return importlib.import_module("gradio")
    except ModuleNotFoundError as error:
        raise ConfigError('serve: gradio is not installed; pip install -c constraints.txt -e ".[serve]"') from error


def free_port(host: str, port: int) -> int:
    """The port, or one that is free where it is 0; ConfigError if the page cannot be there."""
    if not 0 <= port < 2**16:
        raise ConfigError(f"--port: {port}; expected a number from 0 (any that is free) to 65535")
    try:
        found = socket.getaddrinfo(host, port, family=socket.AF_INET, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host: {host}; expected a name or IPv4 address of this machine") from error
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(address)
            taken.listen()
        except OSError as error:
            raise ConfigError(
                f"--host, --port: {host}, {port}: {error.strerror}; expected an address of this machine and a free port"
            ) from error
        return int(taken.getsockname()[1])


def launch(stream: SideBySide, text: PageText, host: str, port: int) -> Any:
    """Serve the page from threads of its own; the server, to be closed. ConfigError if the port has been taken."""
    gradio = require_gradio()
    page = _page(gradio, stream, text)
    # gradio asks its own page whether it is there, which no proxy should be asked for.
    os.environ["no_proxy"] = ",".join(filter(None, (os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), host)))
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    try:
        page.launch(
            server_name=host,
            server_port=port,
            theme=theme,
            css=CSS,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            footer_links=[],
            ssr_mode=False,
        )
    except OSError as error:
        raise ConfigError(f"--port: {port}: taken meanwhile; expected a free one") from error
    return page


class _Looks:
    """What the page's timers and buttons do."""

    def __init__(self, gradio: Any, stream: SideBySide, text: PageText) -> None:
        self._gradio, self._stream, self._text = gradio, stream, text
        # Several tabs look at one view.
        self.parts = lru_cache(maxsize=2)(self._parts)
        self.plots = lru_cache(maxsize=2)(self._plots)

    def look(self, seen: int) -> Any:
        """The parts and the number of the view, unless it is the one that the tab has seen."""
        view = self._stream.view
        return [self._gradio.skip()] * 5 if view.number == seen else [*self.parts(view), view.number]

    def look_at_plots(self, seen: int) -> Any:
        """The same for the plots."""
        view = self._stream.view
        return [self._gradio.skip()] * 3 if view.number == seen else [*self.plots(view), view.number]

    def pause(self) -> None:
        """Pause, or go on."""
        if self._stream.view.status == "paused":
            self._stream.go_on()
        else:
            self._stream.pause()

    def ask(self, question: str, talk: list[Exchange]) -> Iterator[Any]:
        """What is in the box, what was said so far as HTML, and as it is kept."""
        if not question.strip():
            yield [self._gradio.skip()] * 3
            return
        box: Any = ""
        for exchange in _asked(self._stream, question.strip()):
            now = [*talk, exchange][-_KEPT:]
            yield [box, talk_html(now, self._text.names), now]
            box = self._gradio.skip()  # the next question may be in it already

    def _parts(self, view: View) -> tuple[str, str, str, str]:
        button = "Go on" if view.status == "paused" else "Pause"
        notes = [" ".join(note()) for note in self._text.notes]
        return head_html(view, self._text.source), frame_html(view), button, sides_html(view, notes)

    def _plots(self, view: View) -> list[Any]:
        return [_plot(self._gradio, view, *what) for what in _PLOTS]


def _page(gradio: Any, stream: SideBySide, text: PageText) -> Any:
    looks, view = _Looks(gradio, stream, text), stream.view
    head, frame, button, sides = looks.parts(view)
    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    html = partial(gradio.HTML, padding=False, apply_default_css=False)
    with gradio.Blocks(title=f"hybridvl serve: {text.source}", analytics_enabled=False, fill_width=True) as page:
        seen, plotted, talk = gradio.State(-1), gradio.State(-1), gradio.State([])
        top = html(head)
        with gradio.Row():
            with gradio.Column(scale=5, min_width=420):
                picture = html(frame)
                with gradio.Row():
                    pausing = gradio.Button(button, size="sm")
                    anew = gradio.Button("Begin anew", size="sm")
                said = html(talk_html([], text.names))
                with gradio.Row():
                    hint = "Ask about the stream"
                    box = gradio.Textbox(
                        placeholder=hint, show_label=False, container=False, scale=5, elem_id="question"
                    )
                    asking = gradio.Button("Ask", variant="primary", scale=1, min_width=70)
            with gradio.Column(scale=7, min_width=520):
                numbers = html(sides)
                drawn = looks.plots(view)
        looked = [top, picture, pausing, numbers, seen]
        gradio.Timer(_SECONDS).tick(looks.look, [seen], looked, concurrency_limit=None, **quiet)
        gradio.Timer(_PLOT_SECONDS).tick(
            looks.look_at_plots, [plotted], [*drawn, plotted], concurrency_limit=None, **quiet
        )
        pausing.click(looks.pause, **quiet)
        anew.click(stream.begin_anew, **quiet)
        for asked in (box.submit, asking.click):
            asked(looks.ask, [box, talk], [box, said, talk], concurrency_id="ask", concurrency_limit=_REPLIES, **quiet)
    return page


def _asked(stream: SideBySide, question: str) -> Iterator[Exchange]:
    """What has come of a question so far, again and again."""
    exchange = Exchange(question)
    yield exchange
    try:
        for answer in stream.ask(question):
            _, before = exchange.replies.get(answer.side, (None, ""))
            replies = {**exchange.replies, answer.side: (answer.time, before + answer.piece.text)}
            exchange = dataclasses.replace(exchange, replies=replies)
            yield exchange
    except ConfigError as error:
        yield dataclasses.replace(exchange, error=str(error))


_PLOTS = (("milliseconds", "ms", 1.0, "Time of a frame"), ("state_bytes", "MB", MEGA, "Memory held by the state"))


def _plot(gradio: Any, view: View, name: str, unit: str, scale: float, title: str) -> Any:
    rows = [(point.tokens, getattr(point, name) / scale, side.name) for side in view.sides for point in side.points]
    every = sorted(value for _, value, _ in rows)
    top = min(every[-1], _CROPPED * every[int(0.95 * (len(every) - 1))]) if every else 1.0
    rows = [(tokens, min(value, top), side) for tokens, value, side in rows]
    return gradio.LinePlot(
        pd.DataFrame(rows, columns=["tokens", unit, "model"]),
        x="tokens",
        y=unit,
        color="model",
        color_map=dict(zip((side.name for side in view.sides), COLOURS, strict=False)),
        colors_in_legend=[side.name for side in view.sides],
        color_title="",
        y_lim=[0, 1.05 * top],
        title=title,
        height=296,
        buttons=[],
    )
