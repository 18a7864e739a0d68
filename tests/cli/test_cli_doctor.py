"""`hybridvl doctor`: every operator's backends, what each computes, and what happens when one is wrong or broken."""

from __future__ import annotations

import json

import pytest
import torch

from hybridvl.cli import main
from hybridvl.layers.ops.backend import backends_report
from hybridvl.testing import operators


def report(capsys: pytest.CaptureFixture[str], status: int) -> dict:
    assert main(["doctor", "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_every_backend_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, 0)
    assert found["versions"]["torch"] == torch.__version__
    rows = [row for row in found["backends"] if row["device"] == "cpu"]
    assert [(row["op"], row["backend"]) for row in rows] == [(row.op, row.backend) for row in backends_report("cpu")]
    for row in rows:
        assert row["passed"]
        if row["reason"]:
            assert row["error"] is None
        else:
            assert row["error"] < 1e-5
            assert row["dtype"] == "float32"
    # On a CPU the PyTorch paths need nothing.
    assert {row["op"] for row in rows if row["backend"] in ("torch", "reference") and not row["reason"]} == {
        row["op"] for row in rows
    }
    assert all(sum(row["chosen"] for row in rows if row["op"] == op) == 1 for op in {row["op"] for row in rows})


def test_the_table_names_every_operator(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "operator backends" in printed
    for row in backends_report("cpu"):
        assert row.op in printed
        assert row.backend in printed
        assert row.reason in printed


@pytest.mark.parametrize("off", [1.1, float("nan")])
def test_a_wrong_backend_is_found(
    off: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = operators.ssd

    def wrong(*given: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        y, final = right(*given, backend=backend)
        return (y * off if backend == "torch" else y), final

    monkeypatch.setattr(operators, "ssd", wrong)
    rows = report(capsys, 1)["backends"]
    assert [(row["op"], row["backend"]) for row in rows if not row["passed"]] == [("ssd", "torch")]
    assert main(["doctor"]) == 1
    assert ("WRONG" if off == 1.1 else "computes NaN") in capsys.readouterr().out


def test_a_broken_backend_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = operators.attention

    def broken(*given: torch.Tensor, window: int, backend: str) -> torch.Tensor:
        if backend == "sdpa":
            raise ImportError("libkernels.so: undefined symbol")
        return right(*given, window=window, backend=backend)

    monkeypatch.setattr(operators, "attention", broken)
    (row,) = (row for row in report(capsys, 1)["backends"] if not row["passed"])
    assert (row["op"], row["backend"], row["error"]) == ("attention", "sdpa", None)
    assert row["reason"] == "failed: ImportError: libkernels.so: undefined symbol"
