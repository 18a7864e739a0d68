"""The parts of the page of `hybridvl serve` as HTML: the frame, how each model is doing, questions and replies."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hybridvl.cli.replying import printable
from hybridvl.inference.streaming.side_by_side import View
from hybridvl.inference.streaming.sides import SideView

COLOURS = ("#2563eb", "#ea580c")
"""Of the first model and of the second one, in numbers and plots alike."""

MEGA = 1e6
_WIDEST = 640  # pixels of the frame as it is sent
_STATUS = {"waiting": "waiting for the first frame", "playing": "playing", "paused": "paused", "ended": "ended"}

CSS = """
.gradio-container {max-width: 1320px !important; margin: 0 auto !important;
  --soft: color-mix(in srgb, var(--body-text-color) 65%, transparent)}
.gradio-container > main {padding: 14px 20px !important}
.gradio-container .html-container {padding: 0 !important}
.serve-head {display: flex; align-items: baseline; gap: 14px; flex-wrap: wrap}
.serve-head b {font-size: 19px}
.serve-head .source {color: var(--soft); overflow-wrap: anywhere}
.serve-head .status {margin-left: auto; padding: 1px 11px; border-radius: 11px; font-size: 13px;
  background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary)}
.serve-head .status.playing {background: #16a34a; border-color: #16a34a; color: white}
.serve-error {margin-top: 8px; padding: 7px 12px; border-radius: 7px; background: #fef2f2; color: #991b1b;
  border: 1px solid #fecaca; overflow-wrap: anywhere}
.serve-frame {background: #0b0f19; border-radius: 9px; aspect-ratio: 16 / 9; display: flex; position: relative;
  align-items: center; justify-content: center; overflow: hidden; color: #9ca3af}
.serve-frame img {width: 100%; height: 100%; object-fit: contain}
.serve-frame .time {position: absolute; left: 10px; bottom: 9px; padding: 1px 9px; border-radius: 7px; color: white;
  background: rgba(0, 0, 0, .6); font-variant-numeric: tabular-nums; font-size: 14px}
.serve-sides {display: flex; gap: 14px}
.serve-side {flex: 1 1 0; min-width: 0; border: 1px solid var(--border-color-primary); border-radius: 9px;
  border-top: 4px solid var(--side); padding: 9px 13px; background: var(--block-background-fill)}
.serve-side .name {font-weight: 600; overflow-wrap: anywhere}
.serve-side .numbers {display: grid; grid-template-columns: repeat(4, auto); gap: 0 10px; margin: 5px 0 3px}
.serve-side .numbers div {font-size: 12px; color: var(--soft); white-space: nowrap}
.serve-side .numbers b {display: block; font-size: 20px; font-variant-numeric: tabular-nums;
  color: var(--body-text-color)}
.serve-side .note {font-size: 12px; line-height: 1.4; color: var(--soft)}
.serve-foot {font-size: 12px; margin-top: 7px; color: var(--soft)}
.serve-talk {display: flex; flex-direction: column; gap: 7px; height: 412px; overflow-y: auto; padding: 9px 11px;
  border: 1px solid var(--border-color-primary); border-radius: 9px; background: var(--block-background-fill)}
.serve-talk .hint {margin: auto; color: var(--soft)}
.serve-talk .question {align-self: flex-end; max-width: 88%; padding: 5px 11px; border-radius: 11px 11px 2px 11px;
  background: var(--background-fill-secondary)}
.serve-talk .reply {align-self: flex-start; max-width: 88%; padding: 5px 11px; border-radius: 11px 11px 11px 2px;
  border-left: 3px solid var(--side); background: var(--background-fill-secondary)}
.serve-talk .about {font-size: 11px; color: var(--soft)}
.serve-talk .text {white-space: pre-wrap; overflow-wrap: anywhere}
"""


@dataclass
class Exchange:
    """A question, and what has come of the replies.

    question: as it was asked. replies: of each model that answers, by its number: the moment it is about, in seconds,
    and the text so far. error: why there is none.
    """

    question: str
    replies: dict[int, tuple[float | None, str]] = field(default_factory=dict)
    error: str = ""


def head_html(view: View, source: str) -> str:
    """What is shown, whether it goes on, and what ended it."""
    parts = (
        "<b>hybridvl serve</b>",
        f'<span class="source">{escape(source)}</span>',
        f'<span class="status {view.status}">{_STATUS[view.status]}</span>',
    )
    error = f'<div class="serve-error">{escape(view.error)}</div>' if view.error else ""
    return f'<div class="serve-head">{"".join(parts)}</div>{error}'


def frame_html(view: View) -> str:
    """The last frame that was shown, with its time."""
    if view.picture is None:
        return '<div class="serve-frame">no frame yet</div>'
    data = base64.b64encode(_jpeg(view.picture)).decode()
    picture = f'<img alt="the last frame" src="data:image/jpeg;base64,{data}">'
    return f'<div class="serve-frame">{picture}<span class="time">{moment(view.time)}</span></div>'


def sides_html(view: View, notes: Sequence[str]) -> str:
    """How each model is doing; notes: what should be known about each."""
    cards = [_side_html(number, side, note) for number, (side, note) in enumerate(zip(view.sides, notes, strict=True))]
    dropped = f"{view.dropped:,} frames dropped · " if view.dropped else ""
    held = "" if view.resident is None else f"the whole process holds {megabytes(view.resident)} MB of main memory · "
    foot = f"{dropped}{held}times are each model's own work for a frame, without the other's"
    return f'<div class="serve-sides">{"".join(cards)}</div><div class="serve-foot">{foot}</div>'


def talk_html(talk: Sequence[Exchange], names: Sequence[str]) -> str:
    """Questions and replies, the newest first; names: of the models."""
    parts = [] if talk else ['<span class="hint">Ask about what was shown so far. It leaves no trace.</span>']
    for exchange in reversed(talk):
        parts.append(f'<div class="question"><div class="text">{escape(exchange.question)}</div></div>')
        for number, (time, text) in exchange.replies.items():
            about = f'<div class="about">{escape(names[number])} at {moment(time)}</div>'
            parts.append(
                f'<div class="reply" style="--side: {COLOURS[number]}">{about}'
                f'<div class="text">{escape(printable(text))}</div></div>'
            )
        if exchange.error:
            parts.append(f'<div class="serve-error">{escape(exchange.error)}</div>')
    return f'<div class="serve-talk">{"".join(parts)}</div>'


def moment(time: float | None) -> str:
    """A time of the stream in words."""
    return "the beginning" if time is None else f"{time:,.1f} s"


def megabytes(size: int) -> str:
    """Bytes as megabytes with about three digits."""
    value = size / MEGA
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 1000 else 0
    return f"{value:,.{digits}f}"


def _side_html(number: int, side: SideView, note: str) -> str:
    took = side.milliseconds
    numbers = {
        "ms a frame": "?" if took is None else f"{took:,.{took < 1000:d}f}",
        "frames/s alone": "?" if took is None else f"{1000 / took:,.1f}",
        "tokens": f"{side.tokens:,}",
        "MB of state": megabytes(side.state_bytes),
    }
    cells = "".join(f"<div><b>{value}</b>{name}</div>" for name, value in numbers.items())
    if side.stopped:
        note = f"Stopped at {side.tokens:,} tokens, the most it is given. {note}"
    return (
        f'<div class="serve-side" style="--side: {COLOURS[number]}"><div class="name">{escape(side.name)}</div>'
        f'<div class="numbers">{cells}</div><div class="note">{escape(note)}</div></div>'
    )


def _jpeg(pixels: NDArray[np.uint8]) -> bytes:
    picture = Image.fromarray(pixels)
    picture.thumbnail((_WIDEST, _WIDEST))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=85)
    return data.getvalue()
