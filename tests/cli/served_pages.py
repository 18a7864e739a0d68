"""What the tests of `hybridvl serve` share: the command, its page in a browser, and what the library replies."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import browser
from streaming_cases import reply, session_of
from video_cases import decode_all, write_video
from waiting import wait_until

from hybridvl.cli.replying import printable

RATE = 8  # frames a second of the clip
LATE = 5.0  # seconds of the clip after which it may be begun anew, so that it shows

# All that can be seen of the stream, at one moment, but for the picture.
_SEEN = """
(() => {
  const texts = (root, what) => [...root.querySelectorAll(what)].map(node => node.textContent);
  return {
    status: texts(document, ".serve-head .status")[0],
    time: texts(document, ".serve-frame .time")[0],
    sides: [...document.querySelectorAll(".serve-side")].map(side => [
      texts(side, ".name")[0], ...texts(side, ".numbers b"), texts(side, ".note")[0]]),
    talk: texts(document, ".serve-talk .text"),
    about: texts(document, ".serve-talk .about"),
    charts: [...document.querySelectorAll("svg.marks")].map(chart =>
      [...chart.querySelectorAll(".mark-line path")].map(line =>
        [line.getAttribute("stroke"), (line.getAttribute("d").match(/[ML]/g) || []).length])),
  };
})()
"""
# The picture with its time and its mean; null where another one takes its place meanwhile.
_PICTURE = """
(async () => {
  const image = document.querySelector(".serve-frame img");
  try { await image.decode(); } catch { return null; }
  if (!image.isConnected) return null;
  const [width, height] = [image.naturalWidth, image.naturalHeight];
  const context = Object.assign(document.createElement("canvas"), {width, height}).getContext("2d");
  context.drawImage(image, 0, 0);
  const sum = context.getImageData(0, 0, width, height).data.reduce(
    (sum, value, place) => place % 4 < 3 ? sum + value : sum, 0);
  const time = image.parentElement.querySelector(".time").textContent;
  return {time, size: [width, height], shade: sum / (3 * width * height)};
})()
"""
_CLICK = """[...document.querySelectorAll("button")].find(button => button.textContent.trim() === NAME).click()"""
_BOX = """document.querySelector("#question textarea, #question input")"""
_TYPE = f"""
(() => {{
  const box = {_BOX};
  box.value = TEXT;
  box.dispatchEvent(new Event("input", {{bubbles: true}}));
}})()
"""
_LOADED = """performance.getEntriesByType("resource").map(entry => entry.name)"""


class ServedPage:
    """The page in a browser; the stream is at its first frames, however long the browser took to be there."""

    def __init__(self, page: browser.Page, address: str) -> None:
        self._page = page
        assert "Begin anew" in page.texts(address, {"Begin anew"})
        self.begin_anew()

    def begin_anew(self) -> None:
        """Click it, and wait until it shows."""
        wait_until(lambda: (self.moment or 0.0) >= LATE, pause=0.1)
        self.click("Begin anew")
        wait_until(lambda: (moment := self.moment) is not None and moment < LATE, pause=0.1)

    def seen(self) -> dict[str, Any]:
        """What it shows."""
        return self._page.evaluate(_SEEN)

    def picture(self) -> dict[str, Any]:
        """The picture on it: its time, its size and its mean."""
        return wait_until(lambda: self._page.evaluate(_PICTURE))

    @property
    def moment(self) -> float | None:
        """Of the frame that it shows, in seconds; None where it shows none."""
        return time_of(self.seen())

    def once(self, status: str) -> dict[str, Any]:
        """What it shows when the stream is paused, or ended."""
        return wait_until(lambda: found if (found := self.seen())["status"] == status else None, pause=0.1)

    def click(self, name: str) -> None:
        """A button."""
        self._page.evaluate(_CLICK.replace("NAME", json.dumps(name)))

    def type(self, text: str) -> None:
        """A question, in place of what is in the box."""
        self._page.evaluate(_TYPE.replace("TEXT", json.dumps(text)))

    @property
    def typed(self) -> str:
        """What is in the box."""
        return self._page.evaluate(f"{_BOX}.value")

    @property
    def loaded(self) -> list[str]:
        """The addresses of all that it has loaded."""
        return self._page.evaluate(_LOADED)


def time_of(seen: dict[str, Any]) -> float | None:
    """Of the frame on the page, in seconds; None where there is none."""
    return None if "time" not in seen else float(re.fullmatch(r"([\d.]+) s", seen["time"])[1])


def clip(folder: Path) -> Path:
    """Twelve seconds; each frame is 8 of 256 brighter than the one before."""
    return write_video(folder / "bars.mp4", frames=12 * RATE, rate=RATE)


@contextmanager
def served(*arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of the page, and the process that serves it."""
    command = [sys.executable, "-m", "hybridvl", "serve", *arguments, "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            line = process.stdout.readline()
            found = re.match(r"(http://127\.0\.0\.1:\d+/) shows \S+; Ctrl-C ends it$", line)
            assert found is not None, line + process.communicate(timeout=60)[1]
            yield found[1], process
        finally:
            process.kill()


def reply_at(folder: Path, video: Path, moment: float, question: str, most: int) -> str:
    """What the page is to show of the library's reply at a moment of the clip."""
    shown = decode_all(video)[: round(moment * RATE) + 1]
    session = session_of(folder, ((pixels, number / RATE) for number, pixels in enumerate(shown)))
    return printable(reply(session, question, most))
