"""What people see of plans: numbers with prefixes, tables, the picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from rich.table import Table

from hybridvl.models.config import ModelConfig
from hybridvl.plan import Plan, plan_model
from hybridvl.plan.drawing import draw
from hybridvl.plan.tables import comparison_table, layer_table
from hybridvl.plan.units import parameters, tokens, with_prefix


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (7, "7 B"),
        (999, "999 B"),
        (999.4, "999 B"),
        (999.6, "1 kB"),
        (1234, "1.23 kB"),
        (133_890_136, "134 MB"),
        (2_415_919_408, "2.42 GB"),
        (5e22, "5e+04 EB"),
    ],
)
def test_bytes(value: float, text: str) -> None:
    assert with_prefix(value, "B") == text


def test_other_units() -> None:
    assert with_prefix(8.17e9, "") == "8.17 G"
    assert parameters(4_408_381_536) == "4.41B"
    assert parameters(9_439_744) == "9.44M"
    assert parameters(0) == "0"
    assert [tokens(count) for count in (1024, 65536, 1000, 8193)] == ["1K", "64K", "1,000", "8,193"]


def plans(*patterns: str) -> list[Plan]:
    return [plan_model(ModelConfig(pattern=pattern), (1024, 8192)) for pattern in patterns]


def rendered(table: Table) -> list[list[str]]:
    """Cells of the table, row by row."""
    console = Console(width=1000)
    with console.capture() as capture:
        console.print(table)
    rows = [line.strip("│").split("│") for line in capture.get().splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in row] for row in rows]


def test_layer_table() -> None:
    [plan] = plans("(swa gdn*3)*9")
    rows = rendered(layer_table(plan))
    assert rows[-2][:5] == ["9 x", "swa", "9,439,744", "67,633,152", "77,076,992"]
    assert rows[-1][:5] == ["27 x", "gdn", "33,653,024", "67,633,152", "101,290,272"]
    assert rows[-1][-2:] == ["2.16 MB", "2.16 MB"]
    assert rendered(layer_table(plan, compact=True))[-1][2:] == ["33.7M", "67.6M", "101M", "206 M", "2.16 MB"]
    listed = rendered(layer_table(plan, every_layer=True))
    assert [row[:2] for row in listed[-36:]] == [[str(i), "gdn" if i % 4 else "swa"] for i in range(36)]


def test_comparison_table() -> None:
    rows = {row[0]: row[1:] for row in rendered(comparison_table(plans("(swa gdn*3)*9", "full*36")))}
    assert rows["layers"] == ["36", "36"]
    assert rows["mixers"] == ["9 swa, 27 gdn", "36 full"]
    assert rows["params, mixers"] == ["993,589,344", "339,830,784"]
    assert rows["params, total"] == ["3,739,697,248", "3,085,938,688 (0.83x)"]
    assert rows["state at 8K"] == ["133,890,136 B, 134 MB", "301,990,192 B, 302 MB (2.26x)"]
    assert "params, output head" not in rows
    assert "params, vision tower" not in rows


def test_markup_is_not_interpreted() -> None:
    [plan] = plans("swa full")
    bold = "swa(x=[bold, 1]) full"
    plan = dataclasses.replace(plan, pattern=bold)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(layer_table(plan), comparison_table([plan]))
    assert capture.get().count(bold) == 2


def picture(path: Path, drawn: Sequence[Plan]) -> np.ndarray:
    draw(drawn, path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def share(pixels: np.ndarray, colour: str) -> float:
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return float((pixels == wanted).all(-1).mean())


def test_the_strip_shows_each_mixer_by_its_share(tmp_path: Path) -> None:
    pixels = picture(tmp_path / "a.png", plans("(swa gdn*3)*9"))
    swa, gdn = share(pixels, "#e9a23b"), share(pixels, "#2f6690")
    assert gdn > 0.02
    assert gdn / swa == pytest.approx(3, rel=0.1)  # the legend's squares make it a little less
    assert share(pixels, "#c8553d") == 0


def test_side_by_side_mixers_share_a_cell(tmp_path: Path) -> None:
    pixels = picture(tmp_path / "a.png", plans("swa+mamba2*16"))
    assert share(pixels, "#e9a23b") / share(pixels, "#3a9679") == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize(
    "patterns",
    [
        ["full"],
        ["(swa gdn*7)@200", "(full gdn*3)*9"],
        ["swa(window=16) swa(window=32) swa(window=64) swa(window=128)", "gdn*4096"],
        [f"swa(window={i + 1})" for i in range(12)],
    ],
)
def test_pictures_grow_with_what_they_show(tmp_path: Path, patterns: list[str]) -> None:
    pixels = picture(tmp_path / "a.png", plans(*patterns))
    assert pixels.shape[1] == 1800
    assert pixels.shape[0] > 150 * (3 + 1.5 * len(patterns))
    assert (pixels[:, -20:] == 255).all()  # nothing is cut at the right
