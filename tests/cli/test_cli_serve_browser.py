"""`hybridvl serve` in Chromium: the page shows the frame of its time, replies as the library does, and draws charts."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
from served_pages import RATE, ServedPage, clip, reply_at, served, time_of
from streaming_cases import saved_model
from video_cases import decode_all
from waiting import wait_until

from hybridvl.cli.serve_html import COLOURS

NAMES = ["swa gdn", "full*2"]
TOKENS = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("serve")
    return {name: saved_model(place / name.replace("*", "-"), name) for name in NAMES}


@pytest.fixture(scope="module")
def video(folders: dict[str, Path]) -> Path:
    return clip(folders[NAMES[0]].parent)


@browser.NEEDS_CHROMIUM
def test_the_page_in_a_browser(folders: dict[str, Path], video: Path, tmp_path: Path) -> None:
    ours, full = (str(folders[name]) for name in NAMES)
    flags = ["--fps", str(RATE), "--realtime", "--max-new-tokens", str(TOKENS), "--baseline", full]
    with (
        served(str(video), "--checkpoint", ours, *flags) as (address, process),
        browser.opened(tmp_path / "profile") as tab,
    ):
        page = ServedPage(tab, address)

        def ask(question: str) -> dict[str, Any]:
            page.type(question)
            page.click("Ask")
            wanted = [reply_at(folders[name], video, page.moment, question, TOKENS) for name in NAMES]
            wait_until(lambda: page.seen()["talk"][:3] == [question, *wanted], pause=0.1)
            return page.seen()

        early = wait_until(lambda: found if (found := page.seen())["sides"][0][1] != "?" else None, pause=0.1)
        page.click("Pause")
        first = page.once("paused")
        assert [side[0] for side in first["sides"]] == NAMES
        # The frame on the page is that of the time on the page: the next one is 8 brighter.
        picture = page.picture()
        wanted = decode_all(video)[round(time_of(picture) * RATE)]
        assert picture["size"] == [wanted.shape[1], wanted.shape[0]]
        assert abs(picture["shade"] - np.mean(wanted)) < 3
        # What was asked of the stream that stands still is answered as the library does, by both.
        talked = ask("What is <b>that</b>?")
        assert talked["about"] == [f"{name} at {first['time']}" for name in NAMES]
        tab.picture(tmp_path / "page.png")
        page.click("Go on")
        wait_until(lambda: page.moment >= time_of(first) + 3, pause=0.1)
        last = page.once("ended")
        assert time_of(last) == pytest.approx(12 - 1 / RATE, abs=0.1)
        assert float(last["sides"][0][2]) > 0
        for one, two in zip(early["sides"], last["sides"], strict=True):
            assert int(one[3]) < int(two[3])
        assert early["sides"][0][4] == last["sides"][0][4]
        assert float(early["sides"][1][4]) < float(last["sides"][1][4])
        # A line for each model in both charts, of a point for almost every frame: not those during a reply.
        wait_until(lambda: lines(page, 11 * RATE) == [list(COLOURS)] * 2, pause=0.1)
        asked = ask("And now?")
        assert asked["talk"][3:] == talked["talk"]
        assert asked["about"] == [*(f"{name} at {last['time']}" for name in NAMES), *talked["about"]]
        assert [name for name in page.loaded if not name.startswith((address, "data:", "blob:"))] == []
        page.begin_anew()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert (tmp_path / "page.png").stat().st_size > 30_000
    assert [line.partition(":")[0] for line in errors.splitlines()] == NAMES


def lines(page: ServedPage, least: int) -> list[list[str]]:
    """Of each chart, the colours of its lines of at least so many points."""
    return [[colour for colour, points in chart if points >= least] for chart in page.seen()["charts"]]


@browser.NEEDS_CHROMIUM
def test_a_draft_stays_while_a_reply_is_written(folders: dict[str, Path], video: Path, tmp_path: Path) -> None:
    most, ours = 300, folders[NAMES[0]]  # tokens: the reply takes about a second
    flags = ["--fps", str(RATE), "--realtime", "--no-baseline", "--max-new-tokens", str(most)]
    with (
        served(str(video), "--checkpoint", str(ours), *flags) as (address, _),
        browser.opened(tmp_path / "profile") as tab,
    ):
        page = ServedPage(tab, address)
        page.click("Pause")
        moment = time_of(page.once("paused"))
        page.type("What is that?")
        page.click("Ask")
        wait_until(lambda: page.typed == "")
        page.type("And th")
        whole = reply_at(ours, video, moment, "What is that?", most)
        wait_until(lambda: page.seen()["talk"][1:] == [whole], pause=0.1)
        time.sleep(1)  # for what may still come
        assert page.typed == "And th"
