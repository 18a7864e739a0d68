"""The HTML page of a report: whole in itself, and in a browser every run, metric and picture is there."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import browser
import pytest
from report_runs import recipe, write_run, write_study

from hybridvl.cli import main

# Run in the page: each picture's size, the rows of a section's table, and what a click and a search do to them.
PROBE = """
(async () => {
  const runs = document.querySelectorAll("section")[ORDER], table = runs.querySelector("table");
  const names = () => [...table.tBodies[0].rows].filter(row => !row.hidden).map(row => row.cells[0].textContent);
  await Promise.all([...document.images].map(image => image.decode()));
  const found = { images: [...document.images].map(image => image.naturalWidth), names: names() };
  const last = [...table.tHead.rows[0].cells].find(head => head.textContent === "test/exact");
  last.click(); found.rising = names(); last.click(); found.falling = names();
  const search = runs.querySelector("input");
  search.value = "RATIO=1-4"; search.dispatchEvent(new Event("input")); found.searched = names();
  return found;
})()
"""


class Tags(HTMLParser):
    """The addresses that a page loads, and its tags that are still open."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note it."""
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """It closes the last one."""
        assert self.open.pop() == tag


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """The page of a study with one run that failed and a name that HTML would take for a tag."""
    study = write_study(tmp_path / "ratio", {"0": [0.42, 0.40], "1/4": [0.61, 0.66]})
    write_run(study / "ratio=1-4" / "seed_2", recipe(2, {"ratio": "1/4"}), {"test/<b>_exact": 0.75, "test/exact": 0.7})
    write_run(study / "ratio=0" / "seed_2", recipe(2, {"ratio": "0"}))
    assert main(["report", str(study)]) == 0
    return study / "report" / "report.html"


def test_the_page_needs_nothing_else(page: Path) -> None:
    tags = Tags()
    tags.feed(page.read_text())
    assert tags.open == []
    outside = [a for a in tags.addresses if not a.startswith(("#", "data:image/png;base64,"))]
    assert outside == []
    assert sum(address.startswith("data:") for address in tags.addresses) == 4
    assert "<b>" not in page.read_text()


def test_claims_are_not_sorted_and_all_else_is(page: Path) -> None:
    """The parts of a claim stay below it."""
    study = page.parents[1]
    claim = {"claim": "So it is.", "cell": {"ratio": "0"}, "metric": "test/exact", "above": 0}
    (study / "claims.yaml").write_text(json.dumps({"claims": [claim]}))
    assert 'class="table claims"' not in page.read_text()
    assert main(["report", str(study), "--claims", str(study / "claims.yaml")]) == 0
    text = page.read_text()
    assert re.findall(r'class="table (\w+)"', text) == ["claims", *["sorted"] * (text.count("<table>") - 1)]
    assert '".sorted table"' in text
    assert '<td class="n">0.410 [' in text  # the mean of two seeds; what it is over stands to the left
    assert ">2 seeds; expected at least 3 seeds; 2 of 3 runs are done, 1 unfinished</td>" in text


@browser.NEEDS_CHROMIUM
def test_in_a_browser_every_run_and_metric_is_seen(page: Path, tmp_path: Path) -> None:
    order = re.findall(r"<h2>(.*?)</h2>", page.read_text()).index("All runs (6)")
    runs = [f"ratio={label}/seed_{seed}" for label in ("0", "1-4") for seed in range(3)]
    seen = {*runs, "test/exact", "val/exact", "test/<b>_exact", "5 done", "1 unfinished", "0.750"}
    with browser.opened(tmp_path / "profile") as tab:
        assert seen <= set(tab.texts(page.as_uri(), seen))
        found = tab.evaluate(PROBE.replace("ORDER", str(order)))
    assert sorted(found["names"]) == runs
    assert len(found["images"]) == 4
    assert min(found["images"]) > 600
    values = {"ratio=0/seed_1": 0.40, "ratio=0/seed_0": 0.42, "ratio=1-4/seed_0": 0.61, "ratio=1-4/seed_1": 0.66}
    known = [*values, "ratio=1-4/seed_2"]
    assert [name for name in found["rising"] if name in known] == known
    assert [name for name in found["falling"] if name in known] == known[::-1]
    assert sorted(found["searched"]) == runs[3:]
