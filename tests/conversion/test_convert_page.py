"""docs/convert.md: its example runs and prints what the page shows, its Python runs, its flags exist."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from hybridvl.cli import main
from hybridvl.layers import MIXERS
from hybridvl.layers import pieces as rules
from hybridvl.layers.full import FullAttentionConfig
from hybridvl.layers.inherit import inherited_pieces

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "convert.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
RETENTION = ROOT / "docs/examples/hybridvl-retention/src/hybridvl_retention/__init__.py"


def test_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    teacher, api, _ = (code for kind, code in BLOCKS if kind == "python")
    exec(teacher, {})
    command = next(code for kind, code in BLOCKS if kind == "bash" and "convert teacher" in code)
    capsys.readouterr()
    assert main(shlex.split(command)[1:]) == 0
    (shown,) = (code for kind, code in BLOCKS if not kind)
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == shown.splitlines()
    names: dict[str, object] = {}
    exec(api, names)
    assert names["model"].pattern == "(swa gdn)*2"  # type: ignore[attr-defined]


def test_the_rule_of_another_mixer(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("retention_of_the_page", RETENTION)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "retention_of_the_page", module)
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
    before = dict(MIXERS)
    try:
        spec.loader.exec_module(module)
        *_, rule = (code for kind, code in BLOCKS if kind == "python")
        exec(rule, {"RetentionConfig": module.RetentionConfig})
        config = module.RetentionConfig(heads=2, head_dim=4)
        (piece,) = inherited_pieces(config, FullAttentionConfig(heads=2, kv_heads=1, head_dim=4), 8)
    finally:
        MIXERS.clear()
        MIXERS.update(before)
    assert (piece.target, list(piece.into), list(piece.taken)) == ("q_proj.weight", [*range(8)], [*range(8)])


def test_flags_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--help"]) == 0
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert set(re.findall(r"--[a-z][\w-]*", PAGE)) <= known
