"""Every case computes on all its sides the same thing, and a bench of unequal work fails before it times anything."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hybridvl.bench.cases import Request
from hybridvl.bench.catalogue import CASES, build, find_case
from hybridvl.bench.machine import Limits
from hybridvl.bench.runner import Settings, measure
from hybridvl.bench.sides import Results, Side, UnequalWorkError, Work, compare, errors, tensor_side
from hybridvl.layers import ConfigError

SMALL = {"B": 2, "T": 70, "H": 4, "Hkv": 2, "K": 16, "V": 32, "P": 16, "N": 16, "D": 64, "W": 4, "L": 2}


def small(name: str, **changes: object) -> Work:
    case = find_case(name)
    sizes = {letter: SMALL.get(letter, size) for letter, size in case.sizes.items()}
    return case.build(Request(sizes, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_sides_agree(name: str, dtype: torch.dtype) -> None:
    for backward in (False, True) if CASES[name].differentiable else (False,):
        work = small(name, dtype=dtype, backward=backward)
        assert work.sides[0].name == "hybridvl"
        assert len(work.sides) == 1 + len(CASES[name].peers["cpu"])
        differences = compare(work)
        assert set(differences) == {side.name for side in work.sides[1:]}
        for found in differences.values():
            assert any("gradient" in key for key in found) == backward
            assert max(found.values()) < work.tolerance


@pytest.mark.parametrize("name", ["gated-delta-rule", "mamba2-scan"])
def test_sides_agree_on_strong_decays(name: str) -> None:
    work = small(name, backward=True, decay="strong")
    assert "decay strong" in work.title
    assert compare(work)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.has_reference])
def test_errors_against_float64(name: str, dtype: torch.dtype) -> None:
    case = find_case(name)
    sizes = {letter: SMALL.get(letter, size) for letter, size in case.sizes.items()}
    work = build(case, Request(sizes, dtype=dtype, backward=True), errors=True)
    found = errors(work)
    assert set(found) == {side.name for side in work.sides}
    for side in found.values():
        assert side.keys() == work.sides[0].run().keys()
        assert 0 < max(side.values()) < (1e-5 if dtype == torch.float32 else 2e-2)
    assert errors(case.build(Request(sizes))) == {}


def test_ours_alone() -> None:
    work = small("gated-delta-rule", peers=())
    assert compare(work) == {}
    assert [side.name for side in work.sides] == ["hybridvl"]


def spoilt(work: Work, name: str, change: float) -> Work:
    """The work with one result of the peer a little different."""

    def run() -> Results:
        found = work.sides[1].run()
        return {key: value * (1 + change) if key == name else value for key, value in found.items()}

    return dataclasses.replace(work, sides=(work.sides[0], dataclasses.replace(work.sides[1], run=run)))


def never(run: object, repeats: int) -> float:
    raise AssertionError("unequal work was timed")


@pytest.mark.parametrize("name", ["o", "state", "gradient of g"])
def test_unequal_work_is_never_timed(name: str) -> None:
    work = small("gated-delta-rule", backward=True)
    for change in (0.01, float("nan")):
        with pytest.raises(UnequalWorkError, match=f"{name} of transformers differs from that of hybridvl"):
            measure(spoilt(work, name, change), Settings(measure=never))


def test_missing_results_and_shapes_are_unequal() -> None:
    def side(name: str, results: Results, same_as: str | None = None) -> Side:
        return Side(name, lambda: results, same_as=same_as)

    ours = side("ours", {"y": torch.ones(2)})
    for other, message in (({"z": torch.ones(2)}, "gives z"), ({"y": torch.ones(1)}, "shape")):
        sides = (ours, side("peer", other, "ours"))
        with pytest.raises(UnequalWorkError, match=message):
            compare(Work("w", {}, "float32", "forward", "cpu", sides))
    unchecked = (ours, side("another model", {"z": torch.ones(3)}))
    assert compare(Work("w", {}, "float32", "forward", "cpu", unchecked)) == {}


def test_gradients_are_those_of_autograd() -> None:
    x = torch.arange(3.0, requires_grad=True)
    cotangents: dict[str, torch.Tensor] = {}
    found = tensor_side("ours", lambda: {"y": x.square()}, {"x": x}, cotangents).run()
    assert torch.equal(found["gradient of x"], 2 * x.detach() * cotangents["y"])
    assert not found["y"].requires_grad


def test_a_measurement_in_numbers() -> None:
    work = dataclasses.replace(small("gated-delta-rule"), flops=1e9, nbytes=1e8, tokens=140, goal=1.5)
    seconds = {"hybridvl": iter([9.0, 0.1, 0.2, 0.3]), "transformers": iter([9.0, 0.2, 0.4, 0.3])}
    names = {id(side.run): side.name for side in work.sides}
    settings = Settings(rounds=3, memory=False, measure=lambda run, repeats: next(seconds[names[id(run)]]))
    found = measure(work, settings, Limits(2e10, 1e10, 4e9))
    ours, peer = found.sides
    assert ours.spread.median == 0.2
    assert peer.seconds == (0.2, 0.4, 0.3)
    assert found.ratios["transformers"].median == 2.0
    assert found.goal_met
    rates = found.rates(ours)
    assert rates["flops_per_second"] == pytest.approx(5e9)
    assert rates["flops_share_of_limit"] == pytest.approx(0.25)
    assert rates["bytes_share_of_limit"] == pytest.approx(0.05)
    assert rates["tokens_per_second"] == pytest.approx(700)
    record = found.to_dict()
    assert record["goal_met"] is True
    assert record["sides"][0]["seconds"] == [0.1, 0.2, 0.3]
    assert record["differences"]["transformers"]["o"] < 1e-5


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match="unknown, did you mean 'gated-delta-rule'"):
        find_case("gated-delta-rul")
    with pytest.raises(
        ConfigError, match="--peer 'fla': gated-delta-rule has no such peer on cpu; known: transformers"
    ):
        small("gated-delta-rule", peers=("fla",))
    with pytest.raises(ConfigError, match="--errors: gdn-step has no float64 reference; expected one of gated-delta"):
        build(find_case("gdn-step"), Request(find_case("gdn-step").sizes, peers=()), errors=True)
    with pytest.raises(ConfigError, match="H4 Hkv3: expected H to be a multiple of Hkv"):
        find_case("window-attention").build(Request({**SMALL, "Hkv": 3}))
