"""The code in docs/data.md runs, and its table of video settings has every option."""

import dataclasses
import re
from pathlib import Path

import pytest

from hybridvl.data import VideoConfig

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block {number}" for number in range(len(BLOCKS))])
def test_every_python_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "docs/data.md", "exec"), {"__name__": "docs"})


def test_the_table_names_every_video_setting():
    table = PAGE.partition("| setting of `data.videos` |")[2].partition("\n\n")[0]
    named = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == {field.name for field in dataclasses.fields(VideoConfig)}
