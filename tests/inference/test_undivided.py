"""Signals that come while a frame is on its way into a state: held until it is there, and never lost."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import FrameType

import pytest

from hybridvl.inference.streaming.showing import undivided

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Ended(Exception):
    pass


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    def end(number: int, frame: FrameType | None) -> None:
        raise Ended(signal.Signals(number).name)

    before = {number: signal.signal(number, end) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_waits_for_the_end_of_the_block(number: signal.Signals) -> None:
    handlers, done = [signal.getsignal(each) for each in SIGNALS], []

    def block() -> None:
        with undivided():
            signal.raise_signal(number)
            done.append(number)

    with pytest.raises(Ended, match=f"^{number.name}$"):
        block()
    assert done == [number]
    assert [signal.getsignal(each) for each in SIGNALS] == handlers


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_between_two_handlers_is_neither_lost_nor_the_last(
    place: int, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first two handlers are set before the block, the others after it."""
    handlers, change, calls = [signal.getsignal(each) for each in SIGNALS], signal.signal, []

    def changes(*given: object) -> object:
        found = change(*given)
        calls.append(given)
        if len(calls) == place + 1:
            signal.raise_signal(number)
        return found

    with monkeypatch.context() as patch:
        patch.setattr("hybridvl.inference.streaming.showing.signal.signal", changes)
        with pytest.raises(Ended, match=f"^{number.name}$"), undivided():
            pass
    # Whatever was left in its place hands on what comes.
    for each, handler in zip(SIGNALS, handlers, strict=True):
        with pytest.raises(Ended, match=f"^{each.name}$"):
            signal.raise_signal(each)
        signal.signal(each, handler)


def test_signals_that_are_ignored_stay_so() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with undivided():
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
