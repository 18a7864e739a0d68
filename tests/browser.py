"""A headless Chromium for tests: pages as a person sees them, shadow trees and all, over the browser's own pipe."""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NEEDS_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, which is not installed here")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--no-first-run", "--disable-dev-shm-usage"),
)
START = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
# The texts of all that is displayed, one an entry.
TEXTS = """
(() => {
  const texts = [];
  const walk = node => {
    if (node.nodeType === Node.TEXT_NODE) { if (node.textContent.trim()) texts.push(node.textContent.trim()); return; }
    if (node.nodeType !== Node.ELEMENT_NODE) return;
    if (["STYLE", "SCRIPT", "TEMPLATE", "NOSCRIPT"].includes(node.tagName)) return;
    if (node.tagName !== "SLOT" && getComputedStyle(node).display === "none") return;
    const below = node.shadowRoot ? node.shadowRoot.childNodes
      : node.tagName === "SLOT" ? node.assignedNodes() : node.childNodes;
    below.forEach(walk);
  };
  walk(document.body);
  return texts;
})()
"""


class Page:
    """A tab of the browser, which takes commands of its DevTools protocol."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._numbers = itertools.count(1)
        self._read = b""
        self._session = ""
        target = self._call("Target.createTarget", {"url": "about:blank"})["targetId"]
        self._session = self._call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]

    def texts(self, address: str, awaited: set[str], seconds: float = 60) -> list[str]:
        """What a page shows once all that is awaited is there."""
        self._call("Page.navigate", {"url": "about:blank"})
        self._call("Page.navigate", {"url": address})
        until = time.monotonic() + seconds
        while True:
            found = self._evaluated(TEXTS)["result"].get("value") or []  # none as long as there is no body
            if awaited <= set(found) or time.monotonic() > until:
                return found
            time.sleep(0.3)

    def evaluate(self, expression: str) -> Any:
        """What an expression comes to in the page that is shown; of a promise, what it is kept with."""
        answer = self._evaluated(expression)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def picture(self, path: Path) -> None:
        """What it looks like, as PNG."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", {})["data"]))

    def _evaluated(self, expression: str) -> Any:
        asked = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        return self._call("Runtime.evaluate", asked)

    def _call(self, method: str, parameters: dict[str, Any]) -> Any:
        number = next(self._numbers)
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": number, "method": method, "params": parameters, **session}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._read:
                more = os.read(self._answers, 1 << 16)
                assert more, "the browser has gone"
                self._read += more
            text, _, self._read = self._read.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]


@contextmanager
def opened(profile: Path, width: int = 1600, height: int = 1000) -> Iterator[Page]:
    """A page of a browser that is closed afterwards."""
    (reads, commands), (answers, writes) = os.pipe(), os.pipe()
    flags = (*QUIET, f"--window-size={width},{height}", f"--user-data-dir={profile}", "--remote-debugging-pipe")
    # Numbers that are out of the way of 3 and 4, which the browser reads from and writes to.
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (reads, writes)]
    browser = subprocess.Popen(
        [sys.executable, "-c", START, *map(str, ends), str(CHROMIUM), *flags, "about:blank"],
        pass_fds=ends,
        stderr=subprocess.DEVNULL,
    )
    for end in (reads, writes, *ends):
        os.close(end)
    try:
        yield Page(commands, answers)
    finally:
        browser.terminate()
        browser.wait(20)
        os.close(commands)
        os.close(answers)
