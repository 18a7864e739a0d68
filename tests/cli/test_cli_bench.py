"""`hybridvl bench`: what it prints and writes, its exit status, and what it says about mistakes."""

from __future__ import annotations

import csv
import json
import shlex
import struct
from pathlib import Path

import pytest
import torch

from hybridvl.bench import catalogue, stream_cases, suite
from hybridvl.bench.catalogue import find_case
from hybridvl.bench.shapes import parse_shape
from hybridvl.bench.sides import Side, Work
from hybridvl.bench.suite import Row, suite_rows
from hybridvl.cli import main
from hybridvl.cli.arguments import Arguments
from hybridvl.cli.bench_arguments import parser
from hybridvl.cli.mixer_flags import take_mixer_flags
from hybridvl.models.vision import VisionTower

OPS = ["bench", "ops", "--shape", "T70", "H2", "K16", "V16", "--rounds", "1", "--warmup", "0"]
SIZES = ["--width", "64", "--mlp-width", "96", "--vocab", "50", "--rounds", "1", "--warmup", "0", "--no-memory"]


@pytest.fixture(autouse=True)
def _small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridvl.bench.machine._COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr("hybridvl.bench.machine._MATMUL_SIZE", {"cpu": 64})


def test_operators(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = {kind: tmp_path / "out" / f"ops.{kind}" for kind in ("json", "csv", "markdown", "png")}
    files = [word for kind, path in paths.items() for word in (f"--{kind}", str(path))]
    lengths = ["--lengths", "70", "140", "280"]
    assert main([*OPS, *lengths, "--direction", "both", "--errors", *files]) == 0
    shown = capsys.readouterr().out
    assert "errors against float64" in shown
    assert "gated-delta-rule B1 T280 H2 K16 V16" in shown
    assert "growth with length" in shown
    report = json.loads(paths["json"].read_text())
    assert report["machine"]["versions"]["torch"]
    results = report["results"]
    assert [record["sizes"]["T"] for record in results] == [70, 140, 280] * 2
    assert [record["direction"] for record in results] == ["forward"] * 3 + ["forward + backward"] * 3
    for record in results:
        assert [side["name"] for side in record["sides"]] == ["hybridvl", "transformers"]
        assert all(len(side["seconds"]) == 1 for side in record["sides"])
        assert record["ratios"]["transformers"]["low"] <= record["ratios"]["transformers"]["high"]
        assert max(record["differences"]["transformers"].values()) < 1e-4
        assert record["limits"]["matmul_flops"] > 0
        assert max(record["errors"]["hybridvl"].values()) < 1e-5
        assert record["flops"] > 0
    assert [(row["side"], row["work"].split(", ")[-1]) for row in report["growth"]] == [
        (side, way) for way in ("forward", "forward + backward") for side in ("hybridvl", "transformers")
    ]
    rows = list(csv.DictReader(paths["csv"].open()))
    assert len(rows) == 12
    assert float(rows[0]["median"]) == results[0]["sides"][0]["median"]
    table, about = paths["markdown"].read_text().split("\n\nWhat the figures include:\n\n")
    assert len(table.splitlines()) == 2 + 6
    assert len(about.splitlines()) == 3
    assert paths["png"].read_bytes().startswith(b"\x89PNG")


def test_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*OPS, "--peer", "none", "--no-memory", "--json", "-"]) == 0
    [record] = json.loads(capsys.readouterr().out)["results"]
    assert record["ratios"] == {}
    assert record["sides"][0]["peak_bytes"] is None


@pytest.mark.parametrize("name", catalogue.CASES)
def test_every_case_is_listed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "ops", "--list"]) == 0
    assert f"{name} " in capsys.readouterr().out


def test_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "train", "gdn full", *SIZES, "--batch", "1", "--tokens", "33", "--json", "-"]) == 0
    [record] = json.loads(capsys.readouterr().out)["results"]
    assert record["tokens"] == 33
    assert record["differences"]["qwen3-next"].keys() == {"logits", "loss", "gradients"}
    assert [side["name"] for side in record["sides"]] == ["gdn full", "qwen3-next"]
    assert record["sides"][0]["tokens_per_second"] > 0


@pytest.mark.parametrize("part", ["decode", "prefill"])
def test_contexts(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png = tmp_path / "cost.png"
    arguments = [part, "swa gdn", *SIZES, "--contexts", "16", "64", "--peer", "full*2", "qwen2.5-vl", "--png", str(png)]
    assert main(["bench", *arguments, "--mixer.swa.window", "8", "--json", "-"]) == 0
    records = json.loads(capsys.readouterr().out)["results"]
    assert [record["sizes"]["T"] for record in records] == [16, 64]
    assert [list(record["ratios"]) for record in records] == [["full*2", "qwen2.5-vl"]] * 2
    for record in records:
        for side in record["sides"]:
            assert side["ms_per_token"] == pytest.approx(1e3 * side["median"] / record["tokens"])
            assert side["state_bytes"] > 0
    assert png.read_bytes().startswith(b"\x89PNG")


STREAM = [
    *("bench", "stream", "swa gdn", "--peer", "full*2", "qwen2.5-vl", "--width", "64", "--mlp-width", "96", "--vocab"),
    *("600", "--side", "3", "--vision-depth", "1", "--vision-width", "32", "--mixer.swa.window", "8"),
    *("--rounds", "1", "--warmup", "0", "--contexts", "0", "70"),
]


def test_streams(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = {kind: tmp_path / f"stream.{kind}" for kind in ("json", "csv", "markdown", "png")}
    assert main([*STREAM, *(word for kind, path in paths.items() for word in (f"--{kind}", str(path)))]) == 0
    shown = capsys.readouterr().out
    for text in ("stream swa gdn D64 side3 T70", "ms a frame", "frames/s", "state"):
        assert text in shown
    report = json.loads(paths["json"].read_text())
    assert report["includes"].keys() == {"stream", "memory"}
    for text in report["includes"].values():
        assert text in shown
        assert text in paths["markdown"].read_text()
    records = report["results"]
    assert [record["sizes"]["T"] for record in records] == [0, 70]
    for record in records:
        assert record["differences"].keys() == {"qwen2.5-vl"}
        ours, full, theirs = record["sides"]
        token = 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, numbers of a head, bytes
        assert full["state_bytes"] == token * (128 if record["sizes"]["T"] else 64) + 4 * 8  # in blocks, and counters
        assert theirs["state_bytes"] == token * record["sizes"]["T"]
        assert ours["state_bytes"] == records[0]["sides"][0]["state_bytes"]
        for side in record["sides"]:
            assert side["frames_per_second"] == pytest.approx(1 / side["median"])
            assert side["tokens_per_second"] == pytest.approx(9 / side["median"])
            assert side["ms_per_frame"] == pytest.approx(9 * side["ms_per_token"])
    rows = list(csv.DictReader(paths["csv"].open()))
    assert [row["sizes"] for row in rows] == ["D64 side3 T0"] * 3 + ["D64 side3 T70"] * 3
    for name in ("ms_per_frame", "frames_per_second", "tokens_per_second", "state_bytes", "weight_bytes", "peak_bytes"):
        assert all(float(row[name]) >= 0 for row in rows)
    header, _, *lines = paths["markdown"].read_text().split("\n\n")[0].splitlines()
    assert "frames/s, ours / peer | state, ours / peer | memory, ours / peer" in header
    assert len(lines) == 4
    width, height = struct.unpack(">II", paths["png"].read_bytes()[16:24])
    assert width > 1200
    assert height > 500


def test_a_stream_of_another_weight_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = stream_cases.Qwen25VisionPeer

    def wrong(tower: VisionTower) -> stream_cases.Qwen25VisionPeer:
        peer = right(tower)
        norm = peer.tower.blocks[0].norm1
        norm.weight = torch.nn.Parameter(1.01 * norm.weight.detach())
        return peer

    monkeypatch.setattr(stream_cases, "Qwen25VisionPeer", wrong)
    assert main(STREAM) == 1
    shown = capsys.readouterr()
    assert (
        shown.err.strip().splitlines()[-1].startswith("error: stream swa gdn D64 side3 T0, float32, stream: features")
    )
    assert "ms" not in shown.out


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    assert "hybridvl bench stream" in capsys.readouterr().out
    assert main(["bench", "stream", "--help"]) == 0
    assert "--vision-width" in capsys.readouterr().out


def tiny(name: str, sizes: dict[str, int], wrong: bool = False, goal: float | None = None) -> Work:
    sides = (
        Side("hybridvl", lambda: {"y": torch.ones(2)}),
        Side("peer", lambda: {"y": torch.ones(2) * (2 if wrong else 1)}, same_as="hybridvl"),
    )
    return Work(name, sizes, "float32", "forward", "cpu", sides, goal=goal)


def test_a_suite_goes_on_with_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = (
        Row("first", lambda: [tiny("a", {"T": 4}, goal=1e9)]),
        Row("growth", lambda: [tiny("b", {"T": length}) for length in (1, 2, 4)]),
        Row("broken", lambda: [tiny("c", {"T": 4}, wrong=True)]),
    )
    monkeypatch.setitem(suite._SUITES, "cpu", lambda: iter(rows))
    command = ["bench", "--suite", "cpu", "--out", str(tmp_path), "--rounds", "1", "--no-memory"]
    assert main([*command, "--rows", "growth"]) == 0
    assert main([*command, "--rows", "first"]) == 0
    report = json.loads((tmp_path / "cpu.json").read_text())
    assert [record["row"] for record in report["results"]] == ["first", *["growth"] * 3]
    assert [row["side"] for row in report["growth"]] == ["hybridvl", "peer"]
    assert report["results"][0]["goal_met"] is False
    assert "≥ 1e+09, missed" in (tmp_path / "cpu.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"cpu.json", "cpu.csv", "cpu.md", "cpu.png", "cpu-growth.png"}
    capsys.readouterr()
    assert main(command) == 1
    assert "y of peer differs from that of hybridvl by 1.00e+00 of its norm" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "cpu.json").read_text())["results"]) == 4
    (tmp_path / "cpu.json").write_text("{}")
    assert main(command) == 2
    assert "not the results of a suite" in capsys.readouterr().err


def test_the_cpu_suite_has_every_goal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "suite", "cpu", "--list"]) == 0
    listed = capsys.readouterr().out.split()
    assert listed == list(suite_rows("cpu"))
    for part in ("delta-rule", "decays", "decode-step", "mamba2-scan", "mamba2-mixer", "window", "train", "growth"):
        assert any(name.startswith(part) for name in listed)


def test_unequal_work_ends_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from hybridvl.bench import recurrence_cases

    right = recurrence_cases.gated_delta_rule
    monkeypatch.setattr(
        recurrence_cases, "gated_delta_rule", lambda q, *rest, **options: right(2 * q, *rest, **options)
    )
    assert main(OPS) == 1
    shown = capsys.readouterr()
    assert shown.err.strip().splitlines()[-1].startswith("error: gated-delta-rule B1 T70 H2 K16 V16, float32, forward")
    assert "ms" not in shown.out


PAGE = (Path(__file__).parents[2] / "docs" / "bench.md").read_text()
SHOWN = [shlex.split(line)[2:] for line in PAGE.splitlines() if line.startswith("hybridvl bench ")]


@pytest.mark.parametrize("command", SHOWN, ids=" ".join)
def test_the_commands_of_the_page(command: list[str]) -> None:
    rest, _ = take_mixer_flags(command)
    options = parser(Arguments).parse_args(rest)
    if options.what == "ops":
        parse_shape(" ".join(options.shape), find_case(options.case).sizes)


def test_the_page_names_every_case() -> None:
    assert [name for name in catalogue.CASES if f"`{name}`" not in PAGE] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ops", "--case", "gated-delta"], "--case 'gated-delta': unknown, did you mean 'gated-delta-rule'"),
        (["ops", "--shape", "X3"], "--shape 'X3': unknown letter 'X'"),
        (["ops", "--peer", "fla"], "--peer 'fla': gated-delta-rule has no such peer on cpu"),
        (["ops", "--case", "gdn-step", "--lengths", "1K"], "--lengths: the case gdn-step has no length"),
        (["ops", "--backend", "fla"], "'fla' cannot be used"),
        (["ops", "--device", "gpu"], "--device 'gpu': expected cpu, cuda or cuda:N"),
        (["ops", "--device", "meta"], "--device meta: expected cpu"),
        (["ops", "--case", "nothing", "--png", "."], ".: is a folder; expected the name of a file to write"),
        (["ops", "--rounds", "-1"], "--rounds -1: expected at least 1"),
        (["ops", "--threads", "0"], "--threads: 0; expected 1 to 1024"),
        (["ops", "--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
        (["ops", "--mixer.swa.window", "3"], "--mixer.swa: not of bench ops"),
        (["train", "gdm"], "unknown mixer 'gdm', did you mean 'gdn'"),
        (["train", "swa", "--width", "64"], "expected layers of full and gdn alone"),
        (["train", "--peer", "qwen2.5-vl"], "--peer qwen2.5-vl: not of this command; expected qwen3-next"),
        (["train", "--batch", "0"], "--batch 0: expected at least 1"),
        (["decode", "--contexts", "1k5"], "--contexts '1k5': expected a number of tokens"),
        (["decode", "swa", "--width", "64", "--peer", "qwen2.5-vl"], "expected a pattern of full layers too"),
        (["decode", "--contexts", "0"], "--contexts '0': expected a number of tokens"),
        (["stream", "--contexts", "-1"], "--contexts '-1': expected a number of tokens"),
        (["stream", "--side", "0"], "--side 0: expected at least 1"),
        (["stream", "--peer", "qwen3-next"], "--peer qwen3-next: not of this command; expected qwen2.5-vl"),
        (["stream", "--peer", "qwen"], "unknown mixer 'qwen'"),
        (["stream", "swa", "--width", "64", "--peer", "qwen2.5-vl"], "expected a pattern of full layers too"),
        (["stream", "--vision-width", "40"], "--vision-width 40: expected a multiple of 16"),
        (["stream", "--vision-depth", "0"], "vision.depth: 0"),
        (["stream", "--vocab", "64"], "--vocab 64: expected at least"),
        (["suite", "gpu"], "suite 'gpu': unknown; expected one of cpu"),
        (["suite", "cpu", "--rows", "nothing"], "--rows nothing: unknown"),
        ([], "ops|train|prefill|decode|stream|suite"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.startswith("error: ")
    assert "Traceback" not in shown.err
