"""The code in docs/mixers.md runs, and the tables name every option with its default."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from hybridvl.layers import MIXERS
from hybridvl.testing import check_mixer

PAGE = (Path(__file__).parents[2] / "docs" / "mixers.md").read_text()


def test_the_mixer_of_the_page_passes_the_suite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(from dataclasses.*?)```", PAGE, flags=re.S)
    (tmp_path / "page_mixer.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    import page_mixer  # type: ignore[import-not-found]

    try:
        assert check_mixer(page_mixer.EmaConfig(), width=8, tokens=20)
    finally:
        MIXERS.pop("ema")


def documented() -> list[tuple[str, object]]:
    """(option, default) of every row of the tables of options."""
    found = []
    for row in re.findall(r"^\| (`.*?) \| (.*?) \|", PAGE, flags=re.M):
        names = re.findall(r"`(\w+)`", row[0])
        defaults = row[1].split(", ")
        if len(names) == len(defaults):
            found += zip(names, map(read, defaults), strict=True)
    return found


def read(text: str) -> object:
    """A number, true, false, null or a word."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


@pytest.mark.parametrize("name", ["full", "swa", "gdn", "mamba2"])
def test_every_option_and_its_default_are_in_a_table(name: str) -> None:
    table = [(option, str(default)) for option, default in documented()]
    for field in dataclasses.fields(MIXERS[name]):
        assert (field.name, str(field.default)) in table
