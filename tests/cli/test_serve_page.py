"""The question box of `hybridvl serve`: replies as they come, nothing over what is typed meanwhile, mistakes told."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from side_cases import FRAMES, alone, bars, frames_in, session, shown
from streaming_cases import reply
from waiting import wait_until

from hybridvl.cli.replying import printable
from hybridvl.cli.serve_html import Exchange
from hybridvl.cli.serve_page import PageText, _Looks
from hybridvl.data.sources import open_source
from hybridvl.inference.streaming.showing import Showing
from hybridvl.inference.streaming.side_by_side import SideBySide
from hybridvl.inference.streaming.sides import Side

NAMES, MOST, TOKENS = ("swa gdn", "full*2"), 30, 4
SKIP = object()  # gradio's word for what stays as it is


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bars(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def stream(video: Path) -> Iterator[SideBySide]:
    """Of two models that have seen all of the video."""
    sides = [Side(name=name, session=session(name)) for name in NAMES]
    with shown(sides, open_source(video), showing=Showing(max_new_tokens=TOKENS)) as both:
        wait_until(lambda: both.view.status == "ended")
        yield both


def looks_at(stream: SideBySide) -> _Looks:
    return _Looks(SimpleNamespace(skip=lambda: SKIP), stream, PageText(source="", names=NAMES, notes=()))


def texts(html: str) -> list[str]:
    return [unescape(text) for text in re.findall(r'<div class="text">(.*?)</div>', html, re.DOTALL)]


def test_replies_come_piece_by_piece_and_the_box_is_emptied_once(stream: SideBySide, video: Path) -> None:
    before = [Exchange("Before?")]
    boxes, pages, talks = zip(*looks_at(stream).ask("  What is that? ", before), strict=True)
    wanted = [printable(reply(alone(frames_in(video), name), "What is that?", TOKENS)) for name in NAMES]
    assert boxes == ("", *[SKIP] * (len(boxes) - 1))
    assert texts(pages[0]) == ["What is that?", "Before?"]
    assert texts(pages[-1]) == ["What is that?", *wanted, "Before?"]
    assert len(set(pages)) > 3
    for one, two in itertools.pairwise(map(texts, pages)):
        assert all(new.startswith(old) for old, new in zip(one[1:-1], two[1:-1], strict=False))
    assert before == [Exchange("Before?")]
    assert talks[-1][0] == before[0]
    time = (FRAMES - 1) / 4
    assert {number: moment for number, (moment, _) in talks[-1][1].replies.items()} == {0: time, 1: time}


@pytest.mark.parametrize("question", ["", " \n\t"])
def test_a_blank_question_changes_nothing(question: str, stream: SideBySide) -> None:
    assert list(looks_at(stream).ask(question, [Exchange("Before?")])) == [[SKIP] * 3]


def test_only_the_last_exchanges_are_kept(stream: SideBySide) -> None:
    talk: list[Exchange] = [Exchange(f"{number}?") for number in range(MOST - 1)]
    for question in ("29?", "30?", "31?"):
        *_, (_, page, talk) = looks_at(stream).ask(question, talk)
        assert len(talk) == MOST
        assert texts(page)[0] == question
    assert [exchange.question for exchange in talk] == [f"{number}?" for number in range(2, MOST + 2)]


def test_a_question_that_cannot_be_answered_says_why(video: Path) -> None:
    more: dict[str, Any] = {"showing": Showing(max_new_tokens=-1)}
    with shown([Side(name=NAMES[0], session=session())], open_source(video), **more) as one:
        (*_, empty), (box, page, talk) = looks_at(one).ask("What <is> that?", [])
    assert empty == [Exchange("What <is> that?")]
    assert box is SKIP
    assert [exchange.question for exchange in talk] == ["What <is> that?"]
    assert talk[0].error.startswith("max_new_tokens: -1; expected")
    assert f'<div class="serve-error">{talk[0].error}' in unescape(page)
