"""Claims: what intervals decide about them, and what they may not say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from report_runs import recipe, write_run, write_study
from scipy import stats

from hybridvl.ablation.claims import read_claims
from hybridvl.ablation.report import costs
from hybridvl.ablation.report.analysis import analyse
from hybridvl.ablation.report.cache import Cache
from hybridvl.ablation.report.cells import Settings
from hybridvl.ablation.report.runs import collect
from hybridvl.ablation.report.verdicts import Finding, Judged
from hybridvl.ablation.statistics import Interval
from hybridvl.ablation.study import read_study
from hybridvl.ablation.study_record import record_study
from hybridvl.cli import main
from hybridvl.layers.errors import ConfigError

VALUES = {"0": [0.42, 0.40, 0.47], "1/4": [0.61, 0.66, 0.70], "1": [0.60, 0.68, 0.69]}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return write_study(tmp_path / "ratio", VALUES)


def judged(folder: Path, *claims: dict[str, Any], measured: tuple[int, ...] = ()) -> list[Judged]:
    found = read_claims([{"claim": "So it is.", **claim} for claim in claims])
    return list(analyse(collect([folder], Cache()), Settings(), measured=measured, claims=found).claims)


def only(folder: Path, claim: dict[str, Any], measured: tuple[int, ...] = ()) -> Finding:
    ((finding,),) = (judge.findings for judge in judged(folder, claim, measured=measured))
    return finding


@pytest.mark.parametrize(
    ("bounds", "verdict"),
    [
        ({"above": 0.3}, "supported"),
        ({"above": 0.5}, "undecided"),
        ({"above": 0.9}, "not supported"),
        ({"below": 0.9}, "supported"),
        ({"below": 0.4}, "undecided"),
        ({"below": 0.1}, "not supported"),
        ({"between": [0.3, 0.6]}, "supported"),
        ({"between": [0.45, 0.6]}, "undecided"),
        ({"between": [0.6, 0.7]}, "not supported"),
    ],
)
def test_the_interval_decides(study: Path, bounds: dict[str, Any], verdict: str) -> None:
    """That of the first cell is 0.430 [0.340, 0.520]."""
    finding = only(study, {"cell": {"ratio": "0"}, "metric": "test/exact", **bounds})
    low, high = stats.t.interval(0.95, 2, 0.43, stats.sem(VALUES["0"]))
    assert (finding.interval.low, finding.interval.high) == pytest.approx((low, high))
    assert finding.verdict == verdict
    assert finding.quantity == "test/exact of ratio=0"


def test_paired_differences_decide(study: Path) -> None:
    claim = {"cell": {"ratio": "0"}, "than": {"ratio": "1/4"}, "metric": "test/exact", "below": 0}
    finding = only(study, claim)
    interval = stats.ttest_rel(VALUES["0"], VALUES["1/4"]).confidence_interval()
    assert (finding.interval.low, finding.interval.high) == pytest.approx((interval.low, interval.high))
    assert (finding.verdict, finding.claimed) == ("supported", "below 0")
    assert finding.quantity == "test/exact of ratio=0 minus that of ratio=1/4"


verdicts = st.lists(st.sampled_from(["supported", "not supported", "undecided"]), min_size=1, max_size=4)


@given(verdicts)
def test_a_claim_is_as_good_as_its_worst_part(found: list[str]) -> None:
    nothing = Interval(math.nan, math.nan, math.nan, math.nan, 0)
    verdict = Judged("So it is.", tuple(Finding("", "", nothing, verdict) for verdict in found)).verdict
    order = ["not supported", "undecided", "supported"]
    assert verdict == min(found, key=order.index)


def test_states_that_grow_and_states_that_do_not(tmp_path: Path) -> None:
    for mixer, pattern in {"hybrid": "gdn*2 swa", "full": "full*3"}.items():
        config = recipe(0, {"mixer": mixer}, pattern)
        config["model"]["net"]["mixers"]["full"] = {"heads": 2, "kv_heads": 2, "head_dim": 16}
        write_run(tmp_path / mixer / "seed_0", config, {"test/exact": 0.5})
    metric = "growth/state_bytes"
    flat, grows, timed = judged(
        tmp_path,
        {"cell": {"mixer": "hybrid"}, "metric": metric, "between": [1, 1]},
        {"cell": {"mixer": "full"}, "metric": metric, "above": 500},
        {"cell": {"mixer": "full"}, "metric": "growth/decode_seconds", "above": 0},
    )
    assert flat.verdict == grows.verdict == "supported"
    assert grows.findings[0].quantity == f"{metric} of mixer=full, from 128 to 64K tokens"
    assert grows.findings[0].interval.mean == pytest.approx(512, rel=0.01)  # the window's tokens aside
    assert grows.findings[0].basis == "counted, exact"
    assert timed.verdict == "undecided"
    assert timed.findings[0].reason.startswith("not measured; expected --latency with two numbers of tokens")
    claim = {"cell": {"mixer": "full"}, "metric": "growth/decode_seconds", "above": 0.001}
    measured = only(tmp_path, claim, measured=(8, 64, 32))
    assert measured.interval.count == 5
    assert measured.quantity == "growth/decode_seconds of mixer=full, from 8 to 64 tokens"
    assert measured.basis.startswith("5 blocks of timings of one model here")


def test_growth_between_lengths_that_the_claim_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = {8: [0.5] * 5, 64: [1.0, 1.1, 1.0, 0.9, 1.0], 192: [2.0] * 5}  # seconds: a busy machine decides nothing
    times = lambda nets, lengths: {net: {length: blocks[length] for length in lengths} for net in nets}  # noqa: E731
    monkeypatch.setattr(costs, "decode_seconds", times)
    config = recipe(0, {"mixer": "full"}, "full*3")
    config["model"]["net"]["mixers"]["full"] = {"heads": 2, "kv_heads": 2, "head_dim": 16}
    write_run(tmp_path / "full" / "seed_0", config, {"test/exact": 0.5})
    claim = {"cell": {"mixer": "full"}, "tokens": [64, 192], "between": [2.9, 3.1]}
    state = only(tmp_path, {**claim, "metric": "growth/state_bytes"})
    assert state.interval.mean == pytest.approx(3, rel=0.001)
    assert state.quantity == "growth/state_bytes of mixer=full, from 64 to 192 tokens"
    assert state.verdict == "supported"
    time = {**claim, "metric": "growth/decode_seconds", "between": [0.001, 1000]}
    for measured, reason in {
        (): "not measured; expected --latency with 64 192",
        (64,): "measured after 64 tokens alone; expected --latency with 64 192",
        (8, 192): "measured after 8 and 192 tokens alone; expected --latency with 64 192",
    }.items():
        assert (only(tmp_path, time, measured).verdict, only(tmp_path, time, measured).reason) == ("undecided", reason)
    timed = only(tmp_path, time, (8, 64, 192))
    assert timed.verdict == "supported"
    ratios = [2 / seconds for seconds in blocks[64]]
    expected = stats.t.interval(0.95, 4, np.mean(ratios), stats.sem(ratios))
    assert (timed.interval.low, timed.interval.high) == pytest.approx(expected)


def test_one_length_says_nothing_of_growth(tmp_path: Path) -> None:
    """The time after 64 tokens over the time after 64 tokens is 1 in every block."""
    write_run(tmp_path / "a" / "seed_0", recipe(0, {"mixer": "a"}), {"test/exact": 0.5})
    claim = {"cell": {"mixer": "a"}, "metric": "growth/decode_seconds", "between": [0.9, 1.1]}
    finding = only(tmp_path, claim, measured=(64,))
    assert finding.verdict == "undecided"
    assert finding.reason.startswith("measured after 64 tokens alone; expected --latency with two numbers of tokens")


def test_beyond_guessing(tmp_path: Path) -> None:
    for seed, value in enumerate((0.58, 0.6, 0.62)):
        config = recipe(seed, {"mixer": "gdn"})
        path = "hybridvl.data.probes.frame_recall.FrameRecall"
        config["data"]["task"] = {"class_path": path, "init_args": {"frames": 4, "test_streams": 8}}
        write_run(tmp_path / "gdn" / f"seed_{seed}", config, {"test/exact": value})
    finding = only(tmp_path, {"cell": {"mixer": "gdn"}, "metric": "test/exact", "chance": True, "above": 0.4})
    assert finding.interval.mean == pytest.approx(0.5)
    assert finding.quantity == "test/exact of mixer=gdn minus guessing (0.1)"
    assert finding.verdict == "supported"


def test_the_report_states_them(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of the study itself, and those of a file."""
    described = yaml.safe_load((study / "study.yaml").read_text())
    own = {"claim": "More is better.", "cell": {"ratio": 1}, "than": {"ratio": 0}, "metric": "test/exact", "above": 0}
    (study / "study.yaml").write_text(yaml.safe_dump({**described, "claims": [own]}, sort_keys=False))
    more = {
        "claim": "A quarter is <enough>.",
        "parts": [{"cell": {"ratio": "1/4"}, "metric": "test/exact", "above": 0.7}],
    }
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({"claims": [more]}))
    assert main(["report", str(study), "--claims", str(tmp_path / "more.yaml")]) == 0
    found = json.loads((study / "report" / "report.json").read_text())["claims"]
    assert [(claim["text"], claim["verdict"]) for claim in found] == [
        ("More is better.", "supported"),
        ("A quarter is <enough>.", "undecided"),
    ]
    text = (study / "report" / "report.md").read_text()
    assert "- supported: **More is better.**" in text
    assert "    - supported: test/exact of ratio=1 minus that of ratio=0 is 0.227 [" in text
    assert "A quarter is &lt;enough&gt;." in (study / "report" / "report.html").read_text()
    assert "undecided" in capsys.readouterr().out


def test_a_study_may_begin_with_other_cells_than_those_of_its_claims(study: Path) -> None:
    """What is still to come is undecided; the study itself has said that it will come."""
    described = yaml.safe_load((study / "study.yaml").read_text())
    later = {"claim": "Later.", "cell": {"ratio": "1/2"}, "metric": "test/exact", "above": 0}
    other = {"claim": "Other.", "cell": {"ratio": "0"}, "metric": "test/line_exact", "above": 0}
    described |= {"claims": [later, other], "baseline": {"ratio": "1/2"}}
    (study / "study.yaml").write_text(yaml.safe_dump(described, sort_keys=False))
    assert main(["report", str(study)]) == 0
    found = json.loads((study / "report" / "report.json").read_text())
    assert [claim["verdict"] for claim in found["claims"]] == ["undecided", "undecided"]
    assert "ratio: '1/2'; no run has it" in found["claims"][0]["findings"][0]["reason"]
    assert found["notes"][0].startswith("nothing is compared yet: baseline: ratio: '1/2'; no run has it")


def test_the_claims_of_a_study_file(tmp_path: Path) -> None:
    """They are read with the study, checked against its axes, and kept in its folder."""
    (tmp_path / "recipe.yaml").write_text("model: {net: {pattern: gdn}}\n")
    claims = [{"claim": "A", "cell": {"ratio": 0}, "than": {"ratio": "1/2"}, "metric": "test/exact", "below": 0}]
    content: dict[str, Any] = {
        "name": "mini",
        "root": str(tmp_path / "runs"),
        "recipe": "recipe.yaml",
        "axes": {"ratio": {"key": "model.net.pattern", "values": {"0": "gdn*2", "1/2": "gdn swa"}}},
        "claims": claims,
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    study = read_study(path)
    assert list(study.claims) == claims
    assert yaml.safe_load(record_study(study).read_text())["claims"] == claims
    record_study(read_study(path))  # the same again


AXES = {"ratio": ["0", "1/2"], "window": [8, 32], "lr": [0.1, 0.2]}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"ratio": "1/3", "window": 8}, r"claims[0].cell.ratio: '1/3' is no label of the axis; its labels are '0', "),
        ({"ratoi": "0"}, "claims[0].cell.ratoi: unknown key, did you mean 'ratio'?"),
        ({"ratio": "0"}, "claims[0].cell: {'ratio': '0'} fits 2 cells; expected labels that fit one, such as ratio: 0"),
        ({"ratio": "1/2", "window": 32}, "fits 0 cells; expected labels that fit one, and that is not excluded"),
        ({"ratio": "0", "window": 8, "lr": 0.1}, "claims[0].cell.lr: the axis is tuned; expected ratio, window"),
        ({"ratio": "0", "window": 8}, None),
        ({"window": 32}, None),
    ],
)
def test_the_cells_that_claims_of_a_study_name(tmp_path: Path, labels: dict[str, Any], message: str | None) -> None:
    """They are told before anything is trained: a label that is none, and labels of several cells or of none."""
    (tmp_path / "recipe.yaml").write_text("model: {net: {pattern: gdn}}\n")
    content: dict[str, Any] = {
        "name": "mini",
        "recipe": "recipe.yaml",
        "axes": {name: {"key": f"model.net.{name}", "values": values} for name, values in AXES.items()},
        "exclude": [{"ratio": "1/2", "window": 32}],
        "tune": {"lr": "val/loss"},
        "claims": [{"claim": "A", "cell": labels, "metric": "test/exact", "above": 0}],
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    if message is None:
        assert len(read_study(path).claims) == 1
        return
    with pytest.raises(ConfigError) as refused:
        read_study(path)
    assert message in str(refused.value)


def test_mistakes_in_claims_are_named_when_all_runs_are_done(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    described = yaml.safe_load((study / "study.yaml").read_text())
    claim = {"claim": "Typing error.", "cell": {"ratio": "0"}, "metric": "test/exat", "above": 0}
    described |= {"claims": [claim], "seeds": [0, 1, 2]}
    (study / "study.yaml").write_text(yaml.safe_dump(described, sort_keys=False))
    wanted = "warning: claim 'Typing error.': 'test/exat': no run logged it; did you mean 'test/exact'?"
    assert main(["report", str(study)]) == 0
    assert wanted in capsys.readouterr().err
    (study / "study.yaml").write_text(yaml.safe_dump({**described, "seeds": [0, 1, 2, 3]}, sort_keys=False))
    assert main(["report", str(study)]) == 0  # runs are to come that may log it
    assert "warning" not in capsys.readouterr().err


PART = {"cell": {"ratio": "0"}, "metric": "test/exact", "above": 0}


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        (None, "claims: None; expected a list of claims"),
        ([], "claims: []; expected a list of claims"),
        (["yes"], r"claims[0]: 'yes'; expected a mapping of claim and parts"),
        ([{"claim": "", **PART}], "claims[0].claim: ''; expected a sentence"),
        ([{"claim": "A", "parts": []}], "claims[0].parts: []; expected a list of parts"),
        ([{"claim": "A", "parts": [PART], **PART}], "expected a list of parts, or one part beside the claim"),
        ([{"claim": "A", "part": [PART]}], "claims[0].part: unknown key, did you mean 'parts'?"),
        (
            [{"claim": "A", "parts": [{**PART, "abov": 1}]}],
            "claims[0].parts[0].abov: unknown key, did you mean 'above'?",
        ),
        ([{"claim": "A", "cell": {}, "metric": "m"}], "claims[0]: no range; expected one of above: NUMBER"),
        ([{"claim": "A", **PART, "below": 1}], "claims[0]: above, below; expected one of above: NUMBER"),
        ([{"claim": "A", **PART, "above": "high"}], "claims[0].above: 'high'; expected above: NUMBER"),
        ([{"claim": "A", "cell": {}, "metric": "m", "between": [2, 1]}], "claims[0].between: [2, 1]; expected above"),
        ([{"claim": "A", **PART, "metric": 3}], "claims[0].metric: 3; expected the tag of a metric"),
        ([{"claim": "A", **PART, "chance": "yes"}], "claims[0].chance: 'yes'; expected true or false"),
        ([{"claim": "A", **PART, "tokens": [1, 2]}], "claims[0].tokens: [1, 2]; expected none, as only growth/state_b"),
        (
            [{"claim": "A", **PART, "metric": "growth/state_bytes", "tokens": [64, 8]}],
            "claims[0].tokens: [64, 8]; expected two numbers of tokens, as [1024, 16384]",
        ),
    ],
)
def test_claims_that_say_nothing(claims: Any, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_claims(claims)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({**PART, "cell": {"ratio": "1/3"}}, "claims[0]: cell: ratio: '1/3'; no run has it, there are 0, 1/4, 1"),
        ({**PART, "cell": {"window": 4}}, "claims[0]: cell: window: no label; the labels are ratio"),
        (
            {**PART, "cell": {}},
            "claims[0]: cell: no label fits 3 cells; expected labels that fit one of ratio=0; ratio=1/4",
        ),
        ({**PART, "metric": "test/exakt"}, "claims[0]: 'test/exakt': no run logged it; did you mean 'test/exact'?"),
        (
            {**PART, "metric": "growth/state_bytes", "than": {"ratio": "1"}},
            "claims[0].than: {'ratio': '1'}; growth/state_bytes is of one cell: expected a part for each of the two",
        ),
    ],
)
def test_claims_about_nothing(study: Path, tmp_path: Path, part: dict, message: str, capsys: Any) -> None:
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump({"claims": [{"claim": "A", **part}]}))
    assert main(["report", str(study), "--claims", str(tmp_path / "claims.yaml")]) == 2
    assert message in capsys.readouterr().err
