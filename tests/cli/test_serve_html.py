"""The parts of the page of `hybridvl serve`: figures as they are, and nothing of a model or a source taken for HTML."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from hybridvl.cli.serve_html import Exchange, frame_html, head_html, megabytes, moment, sides_html, talk_html
from hybridvl.inference.streaming.side_by_side import View
from hybridvl.inference.streaming.sides import SideView

SIDE = SideView(
    name="swa <gdn>", frames=3, tokens=1234, milliseconds=12.5, state_bytes=7_654_321, points=(), stopped=False
)


def texts(html: str) -> list[str]:
    return [text for text in re.split(r"<[^>]*>", html) if text]


def test_the_frame_is_the_picture_in_a_size_that_can_be_sent() -> None:
    pixels = np.zeros((900, 1800, 3), np.uint8)
    pixels[:, 900:] = (200, 100, 50)
    html = frame_html(View(status="playing", time=1234.56, picture=pixels))
    assert texts(html) == ["1,234.6 s"]
    data = re.search(r'src="data:image/jpeg;base64,([^"]+)"', html)
    assert data is not None
    sent = np.asarray(Image.open(io.BytesIO(base64.b64decode(data[1]))), dtype=int)
    assert sent.shape == (320, 640, 3)
    assert abs(sent[160, 100]).max() <= 3
    assert abs(sent[160, 500] - (200, 100, 50)).max() <= 3
    assert texts(frame_html(View())) == ["no frame yet"]


def test_figures_of_each_model() -> None:
    stopped = SideView(
        name="full*2", frames=1, tokens=60, milliseconds=None, state_bytes=512_000, points=(), stopped=True
    )
    view = View(status="playing", dropped=1200, resident=345_600_000, sides=(SIDE, stopped))
    shown = texts(sides_html(view, ["It <answers>.", "Made."]))
    ours = ["12.5", "ms a frame", "80.0", "frames/s alone", "1,234", "tokens", "7.65", "MB of state"]
    full = ["?", "ms a frame", "?", "frames/s alone", "60", "tokens", "0.512", "MB of state"]
    notes = ["It &lt;answers&gt;.", "Stopped at 60 tokens, the most it is given. Made."]
    held = "1,200 frames dropped · the whole process holds 345.6 MB of main memory"
    foot = f"{held} · times are each model's own work for a frame, without the other's"
    assert shown == ["swa &lt;gdn&gt;", *ours, notes[0], "full*2", *full, notes[1], foot]


def test_what_ended_a_stream() -> None:
    assert texts(head_html(View(status="playing"), "a<b>.mp4")) == ["hybridvl serve", "a&lt;b&gt;.mp4", "playing"]
    ended = View(status="ended", error="SOURCE: <gone>")
    assert texts(head_html(ended, "x")) == ["hybridvl serve", "x", "ended", "SOURCE: &lt;gone&gt;"]


def test_questions_come_with_replies_and_their_moments() -> None:
    talk = [
        Exchange("First?", {0: (None, "a<b>")}),
        Exchange("<i>Second?", {0: (2.5, "One"), 1: (2.0, "Two")}),
        Exchange("Third?", error="torn"),
    ]
    assert texts(talk_html(talk, ["swa", "full"])) == [
        *("Third?", "torn", "&lt;i&gt;Second?", "swa at 2.5 s", "One", "full at 2.0 s", "Two"),
        *("First?", "swa at the beginning", "a&lt;b&gt;"),
    ]
    assert texts(talk_html([], ["swa"])) == ["Ask about what was shown so far. It leaves no trace."]
    assert moment(None) == "the beginning"


@pytest.mark.parametrize(
    ("size", "text"),
    [(34_840, "0.035"), (999_000, "0.999"), (1_000_000, "1.00"), (12_345_678, "12.3"), (12_345_678_901, "12,346")],
)
def test_megabytes(size: int, text: str) -> None:
    assert megabytes(size) == text
