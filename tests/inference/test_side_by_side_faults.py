"""A stream to sessions side by side that its source, a layer or whoever watches it has ended, and that begins anew."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from side_cases import FRAMES, Gated, alone, bars, frames_in, refused, session, shown
from streaming_cases import equal_states, reply
from video_cases import decode_all
from waiting import wait_until

from hybridvl.data.sources import FrameSource, open_source
from hybridvl.data.sources.frames import Moment
from hybridvl.data.sources.interrupts import Interrupt
from hybridvl.data.sources.live import LiveConfig
from hybridvl.inference.streaming.showing import Showing
from hybridvl.inference.streaming.side_by_side import SideBySide
from hybridvl.inference.streaming.sides import Side
from hybridvl.layers.errors import ConfigError


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bars(tmp_path_factory.mktemp("side"))


def test_a_lost_source_ends_the_stream_and_may_be_opened_again(video: Path) -> None:
    pixels = decode_all(video)[:2]
    source = Gated(pixels, fails=True)
    openings = itertools.chain([refused], itertools.repeat(lambda interrupt: open_source(video)))
    side = Side(name="ours", session=session())
    more = {"loop": True, "showing": Showing(max_new_tokens=6)}
    with shown([side], source, lambda interrupt: next(openings)(interrupt), **more) as one:
        source.gate.release(9)
        wait_until(lambda: one.view.status == "ended")
        assert (one.view.error, one.view.sides[0].frames) == ("gated: the cable is out", 2)
        told = "".join(answer.piece.text for answer in one.ask("And now?"))
        assert told == reply(alone(frames_in(video)[:2]), "And now?", 6)
        one.begin_anew()
        wait_until(lambda: one.view.error == "SOURCE: it is gone")
        one.begin_anew()
        wait_until(lambda: one.view.sides[0].frames >= FRAMES)


@pytest.mark.timeout(60)  # seconds; the wait that is to be ended is of ten minutes
def test_an_opening_that_waits_is_given_up(video: Path) -> None:
    """By the end of the stream, and by a further wish to begin anew."""
    sides = [Side(name="ours", session=session())]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        wanted = iter([address, video, address])

        def opening(interrupt: Interrupt) -> FrameSource:
            return open_source(next(wanted), live=LiveConfig(timeout=600), interrupt=interrupt)

        with shown(sides, open_source(video), opening) as one:
            wait_until(lambda: one.view.status == "ended")
            one.begin_anew()
            with silent.accept()[0]:
                assert one.view.status == "waiting"
                one.begin_anew()
                wait_until(lambda: one.view.status == "ended")
                assert (one.view.error, one.view.sides[0].frames) == ("", FRAMES)
            one.begin_anew()
            waited_for, _ = silent.accept()
        waited_for.close()
    assert one.view.error == ""


def test_a_stream_that_a_fault_has_ended_begins_anew(video: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Memory may run out, for the baseline first of all."""

    class Full(Gated):
        def _moments(self) -> Iterator[Moment]:
            raise MemoryError("no room")
            yield

    with shown(
        [Side(name="ours", session=session())], Full(decode_all(video)), lambda interrupt: open_source(video)
    ) as one:
        wait_until(lambda: one.view.status == "ended")
        assert one.view.error == "MemoryError: no room"
        one.begin_anew()
        wait_until(lambda: one.view.sides[0].frames >= FRAMES)
    assert "no room" in capsys.readouterr().err


def test_a_stream_begins_anew_after_a_fault_in_a_layer(
    video: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which leaves one state torn, and another one frame ahead."""
    patterns = ["swa gdn", "full*2"]
    sides = [Side(name=pattern, session=session(pattern)) for pattern in patterns]
    layer, calls = sides[0].session.model.decoder.layers[1], itertools.count(1)
    forward = layer.forward

    def fails_once(*given: Any, **named: Any) -> Any:
        if next(calls) == 4:
            raise RuntimeError("out of order")
        return forward(*given, **named)

    monkeypatch.setattr(layer, "forward", fails_once)
    with shown(sides, open_source(video), lambda interrupt: open_source(video)) as both:
        wait_until(lambda: both.view.status == "ended")
        assert (both.view.error, both.view.sides[0].frames) == ("RuntimeError: out of order", 3)
        with pytest.raises(ConfigError, match=r"^the stream: a frame broke off within the layers; expected reset"):
            both.ask("And now?")
        both.begin_anew()
        wait_until(lambda: both.view.status == "ended" and not both.view.error)
    for side, pattern in zip(sides, patterns, strict=True):
        assert equal_states(side.session, alone(frames_in(video), pattern))
    assert [found.frames for found in both.view.sides] == [FRAMES, FRAMES]
    assert "out of order" in capsys.readouterr().err


def test_one_that_never_began_closes_its_source(video: Path) -> None:
    source = open_source(video)
    SideBySide([Side(name="ours", session=session())], source, refused).close()
    with pytest.raises(RuntimeError, match="closed already"):
        iter(source)
