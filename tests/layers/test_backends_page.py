"""docs/backends.md against the table of backends, and the examples that it gives."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from hybridvl.layers import MIXERS
from hybridvl.layers.errors import ConfigError
from hybridvl.layers.ops.backend import backends_report, resolve_backend

PAGE = (Path(__file__).parents[2] / "docs" / "backends.md").read_text()


def table() -> dict[str, list[str]]:
    """Backends of every operator, in the order of their numbers."""
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line[:1] == "|"]
    start = next(index for index, row in enumerate(rows) if row[0] == "operator")
    names, found = rows[start][1:], {}
    for row in rows[start + 2 :]:
        if row[0] == "backend":
            break
        places = {int(place): name for name, place in zip(names, row[1:], strict=True) if place}
        found[row[0]] = [places[place] for place in range(1, len(places) + 1)]
    return found


def test_operators_and_their_order() -> None:
    listed: dict[str, list[str]] = {}
    for row in backends_report():
        listed.setdefault(row.op, []).append(row.backend)
    assert table() == listed


def test_every_backend_is_explained() -> None:
    for name in {row.backend for row in backends_report()}:
        assert re.search(rf"^\| `{name}` \| ", PAGE, re.MULTILINE)


def test_the_error_is_the_one_that_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridvl.layers.ops.backend._INSTALLED", frozenset({"flash_attn"}))
    with pytest.raises(ConfigError) as caught:
        resolve_backend("attention", "flash_attn", torch.device("cuda"), torch.float32, 128, 128)
    assert str(caught.value) in PAGE


def test_the_options_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    options = re.findall(r"(\w+): \{backend: (\w+)\}", PAGE)
    assert len(options) == 2
    for mixer, backend in options:
        assert MIXERS[mixer](backend=backend).backend == backend
    for text in re.findall(r"HYBRIDVL_BACKEND=(\S+) hybridvl fit", PAGE):
        monkeypatch.setenv("HYBRIDVL_BACKEND", text)
        assert resolve_backend("ssd", "auto", torch.device("cpu")) in ("reference", "torch")
