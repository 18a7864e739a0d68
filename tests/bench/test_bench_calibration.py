"""Calibration and prediction: rates recovered from times, times added up from rates, and one measured in miniature."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridvl.bench import calibration as measuring
from hybridvl.bench.calibration import Calibrator, fit
from hybridvl.bench.machine import describe
from hybridvl.bench.sizes import model_config
from hybridvl.cli import main
from hybridvl.layers import MIXERS, ConfigError
from hybridvl.plan import plan_model
from hybridvl.plan.prediction import (
    CACHED,
    MODES,
    PARTS,
    Calibration,
    Pass,
    load_calibration,
    mixer_features,
    predictions,
    same_machine,
)

rates = st.floats(1e-3, 1e3)


@given(st.lists(rates, min_size=2, max_size=4), st.integers(0, 1000))
def test_rates_are_recovered(expected: list[float], seed: int) -> None:
    features = np.random.default_rng(seed).uniform(0.1, 10, (12, len(expected)))
    found = fit([(tuple(row), float(row @ expected)) for row in features])
    assert [float(np.dot(row, found)) for row in features] == pytest.approx(list(features @ expected), rel=1e-6)


def test_rates_are_never_negative_nor_below_what_the_machine_can_do() -> None:
    points = [((1.0, x, 2 * x), 1 + x) for x in (1.0, 2.0, 5.0)]
    assert min(fit(points)) >= 0
    least = fit(points, least=0.8)
    assert least[1] >= 0.8
    for features, seconds in points:
        assert np.dot(features, least) == pytest.approx(seconds)
    assert fit([((1.0, x), 10 - x) for x in (1.0, 2.0, 5.0)])[1] == 0


def calibration(**chosen: dict[str, list[float]]) -> Calibration:
    """Rates of 0 except the chosen ones."""
    kinds = {name: {"train": [0.0] * 5, "prefill": [0.0] * 5, "decode": [0.0] * 3} for name in ("full", "swa", "gdn")}
    kinds |= {"mlp": {"train": [0.0] * 3, "prefill": [0.0] * 3, "decode": [0.0] * 2}}
    kinds |= {"embedding": {"train": [0.0] * 3}, "head": {"train": [0.0] * 3, "decode": [0.0] * 2}}
    kinds |= {"optimizer": {"train": [0.0] * 2}, "call": {"decode": [0.0]}}
    for name, modes in chosen.items():
        kinds[name] = {**kinds.get(name, {}), **modes}
    return Calibration({"dtype": "float32"}, {}, kinds, dict.fromkeys(MODES, 0.05), [])


CONFIG = model_config("(swa gdn*3)*2 full+gdn", 64, 96, 100)


def test_times_add_up_to_the_planned_costs() -> None:
    """With a rate of 1 for what FLOPs are made of, and 0 for all else, times are the plan's FLOPs."""
    plan = plan_model(CONFIG, (64, 640), torch.float32)
    products = [0.0, 1.0, 1.0, 0.0, 0.0]
    mixers = {name: {"train": products, "prefill": products} for name in ("full", "swa", "gdn")}
    flops = calibration(**mixers, mlp={"train": [*products[:3][:2], 0.0], "prefill": [0.0, 1.0, 0.0]})
    layers = plan.prefill_flops(640) - plan.head_flops
    # Convolutions and other vectors count as products of a projection where a mixer's FLOPs leave them out.
    assert flops.train_seconds(CONFIG, 3, 640) == pytest.approx(3 * 640 * layers, rel=0.02)
    assert flops.prefill_seconds(CONFIG, 640) == pytest.approx(640 * layers, rel=0.02)
    counted = calibration(mlp={"prefill": [1.0, 0.0, 0.0]}, call={"decode": [100.0]})
    assert counted.prefill_seconds(CONFIG, 2049) == 3 * (9 + 100)
    state = calibration(**{name: {"decode": [0.0, 0.0, 1.0]} for name in ("full", "swa", "gdn")})
    norms = 2 * 8  # the lengths beside the layers' states
    assert state.decode_seconds(CONFIG, 639) == pytest.approx(plan.state_bytes(640) - norms)
    weights = calibration(optimizer={"train": [0.0, 1.0]})
    assert weights.train_seconds(CONFIG, 1, 1) == pytest.approx(plan.total_params, rel=0.02)


def test_small_models_stay_in_the_cache() -> None:
    """Rates go over from the cache's to the memory's while weights and state grow from half of the cache to all."""
    rates = {"decode": [10.0, 0.0, 0.0], CACHED: [1.0, 0.0, 0.0]}
    parts = {"mlp": {CACHED: [0.0] * 2}, "head": {CACHED: [0.0] * 2}}
    found = calibration(**dict.fromkeys(("full", "swa", "gdn"), rates), **parts)
    plan = plan_model(CONFIG, (64,), torch.float32)
    size = 4 * plan.total_params + plan.state_bytes(64)
    for cache, layer in ((2.2 * size, 1), (4 / 3 * size, 5.5), (0.9 * size, 10)):
        sized = dataclasses.replace(found, limits={"cache_bytes": cache})
        assert sized.decode_seconds(CONFIG, 64) == pytest.approx(10 * layer, rel=0.02)  # ten mixers


def test_unmeasured_mixers_have_the_mean_rates() -> None:
    known = calibration(**{name: {"decode": [rate, 0.0, 0.0]} for name, rate in (("full", 1), ("swa", 2), ("gdn", 6))})
    assert known.decode_seconds(model_config("mamba2*2", 64, 0, 10), 5) == 6


def test_predictions_by_context() -> None:
    found = predictions(calibration(call={"decode": [1.0]}), CONFIG, (64, 2048), 2, 32)
    assert found["prefill"] == {"64": 1.0, "2048": 2.0}
    assert found["decode"] == {"64": 1.0, "2048": 1.0}
    assert (found["train_rows"], found["train_tokens"]) == (2, 32)


def test_features_of_a_decode_step_are_bytes() -> None:
    (mixer,) = model_config_mixer("gdn")
    found = mixer_features(mixer, 64, Pass("decode", 3, 1, 10), torch.bfloat16)
    assert found == (1.0, 2 * mixer.num_params(64), 3 * mixer.state_bytes(11, torch.bfloat16))


def model_config_mixer(name: str) -> list:
    from hybridvl.pattern import parse_pattern

    return parse_pattern(name, CONFIG.mixers).configs(CONFIG.mixers)


@pytest.fixture
def miniature(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that is measured, in sizes that take no time."""
    monkeypatch.setattr(measuring, "_WIDTHS", (32, 64))
    passes = (
        Pass("train", 1, 8),
        Pass("train", 2, 8),
        Pass("prefill", 1, 8, 4),
        *(Pass(mode, 1, 1, 4) for mode in ("decode", CACHED)),
    )
    monkeypatch.setattr(measuring, "_PASSES", passes)
    monkeypatch.setattr(measuring, "_MLPS", ((32, 48), (64, 80), (64, 96)))
    monkeypatch.setattr(measuring, "_HEADS", ((32, 64, 16), (64, 32, 8)))
    monkeypatch.setattr(measuring, "_HELD_OUT", (("swa+mamba2 gdn", 48, 64, 40), ("full", 48, 0, 40)))
    monkeypatch.setattr(measuring, "_HELD_OUT_SIZES", (2, 8, 12, 12))
    monkeypatch.setattr(measuring, "_LEAST_BYTES", 1 << 16)
    monkeypatch.setattr("hybridvl.bench.machine._COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr("hybridvl.bench.machine._MATMUL_SIZE", {"cpu": 64})


@pytest.mark.usefixtures("miniature")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_calibration_in_miniature(dtype: torch.dtype, tmp_path: Path) -> None:
    found = Calibrator(dtype).run()
    assert set(found.rates) == {*MIXERS, *PARTS}
    assert all(rate >= 0 for modes in found.rates.values() for given in modes.values() for rate in given)
    assert found.errors.keys() == set(MODES)
    assert len(found.held_out) == 2 * len(MODES)
    for row in found.held_out:
        assert row["measured"] > 0
        assert row["predicted"] > 0
    errors = [abs(row["predicted"] / row["measured"] - 1) for row in found.held_out if row["mode"] == "train"]
    assert found.errors["train"] == pytest.approx(sum(errors) / 2)
    found.save(tmp_path / "kept" / "file.json")
    assert load_calibration(tmp_path / "kept" / "file.json") == found
    assert same_machine(found, {**describe("cpu"), "dtype": found.about["dtype"]})
    assert not same_machine(found, {**describe("cpu"), "dtype": "other"})
    assert found.train_seconds(CONFIG, 2, 64) > 0


@pytest.mark.usefixtures("miniature")
def test_the_command_measures_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = ["plan", "(swa gdn)*2", "full*2", "--calibrate", "--dtype", "float32", "--context", "64", "--json", "-"]
    assert main(command) == 0
    first = json.loads(capsys.readouterr().out)
    assert [plan["pattern"] for plan in first] == ["(swa gdn)*2", "full*2"]
    assert first[0]["predicted_seconds"].keys() >= {"train_step", "prefill", "decode"}
    assert first[0]["prediction_error"].keys() == set(MODES)
    [path] = (tmp_path / "hybridvl").iterdir()
    kept = path.read_bytes()
    monkeypatch.setattr(Calibrator, "run", lambda self: pytest.fail("measured again"))
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out) == first
    assert main([*command[:-2], "--batch", "3", "--tokens", "2048"]) == 0
    shown = capsys.readouterr().out
    assert "training step, 3 x 2K" in shown
    assert "held-out models: train" in shown
    monkeypatch.setattr(Calibrator, "run", lambda self: dataclasses.replace(calibration(), about={"dtype": "float32"}))
    assert main(["plan", "full", "--calibrate", "--calibration", str(path), "--dtype", "float32"]) == 0
    assert path.read_bytes() == kept
    text = json.loads(kept)
    text["about"]["cpu"] = "another"
    path.write_text(json.dumps(text))
    monkeypatch.setattr(Calibrator, "run", lambda self: load_calibration(path))
    assert main(command) == 0  # another machine's: measured anew


@pytest.mark.parametrize(
    ("arguments", "content", "message"),
    [
        (["--dtype", "float64"], None, "--dtype float64: expected float32 or bfloat16 with --calibrate"),
        (["--batch", "0"], None, "--batch 0: expected at least 1"),
        (["--device", "gpu"], None, "--device 'gpu': expected cpu, cuda or cuda:N"),
        ([], "{", "not a calibration"),
        ([], '{"version": 0}', "a calibration of another version"),
        ([], '{"version": 1}', "not a calibration"),
        (
            [],
            '{"version": 1, "about": {"dtype": "float32"}, "limits": 0, "rates": 0, "errors": 0, "held_out": 0}',
            "of float32",
        ),
    ],
)
def test_mistakes(
    arguments: list[str], content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "calibration.json"
    if content is not None:
        path.write_text(content)
    assert main(["plan", "full", "--calibrate", "--calibration", str(path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_another_versions_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("[]")
    with pytest.raises(ConfigError, match="not a calibration"):
        load_calibration(tmp_path / "file")
