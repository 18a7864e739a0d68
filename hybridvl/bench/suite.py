"""Named sets of measurements: every row of what must be shown on a CPU, with its goal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from hybridvl.bench.cases import Request
from hybridvl.bench.catalogue import build, find_case
from hybridvl.bench.model_cases import QWEN3_NEXT, QWEN25, ModelRequest, decode_works, train_work
from hybridvl.bench.shapes import parse_shape
from hybridvl.bench.sides import Work
from hybridvl.bench.sizes import model_config
from hybridvl.layers.errors import ConfigError

_F32, _BF16 = torch.float32, torch.bfloat16
_INFINITEVL = "B1 T8192 H16 K128 V256"
_LENGTHS = tuple(1024 << step for step in range(7))  # 1 K to 64 K

GROWTH_SHAPES = {
    "gated-delta-rule": "B1 H4 K128 V128",
    "mamba2-scan": "B1 H8 P64 N128",
    "window-attention": "B1 H4 Hkv2 K128 W512",
}
"""Operators whose cost must be linear in the length, and the sizes at which that is shown."""


_ERRORS = {
    "gated-delta-rule": "B2 T333 H4 K64 V128",
    "mamba2-scan": "B2 T333 H4 P64 N128",
    "window-attention": "B2 T333 H4 Hkv2 K64 W100",
    "causal-conv": "B2 T333 D256",
    "gated-norm": "B2 T333 H4 V128",
}


@dataclass(frozen=True)
class Row:
    """One line of a suite: its name, and what makes its work (several where a context or a length varies)."""

    name: str
    works: Callable[[], Iterable[Work]]
    rounds: int = 7


def suite_rows(name: str) -> dict[str, Row]:
    """The rows of a suite by name; ConfigError for an unknown suite."""
    if name not in _SUITES:
        raise ConfigError(f"suite {name!r}: unknown; expected one of {', '.join(_SUITES)}")
    return {row.name: row for row in _SUITES[name]()}


def _cpu_rows() -> Iterator[Row]:
    both, forward = True, False
    wide, small = "B1 T2048 H16 K128 V128", "B16 T256 H4 K32 V64"
    for label, shape, dtype, backward, goal in (
        ("delta-rule", wide, _F32, forward, 2.3),
        ("delta-rule", wide, _F32, both, 3.5),
        ("delta-rule", wide, _BF16, forward, 2.0),
        ("delta-rule", wide, _BF16, both, 8.0),
        ("delta-rule-small", small, _F32, forward, 2.0),
        ("delta-rule-small", small, _F32, both, 2.0),
    ):
        yield _op(label, "gated-delta-rule", shape, dtype, backward, goal)
    yield _op("delta-rule-infinitevl", "gated-delta-rule", _INFINITEVL, _F32, both, 3.5, rounds=5)
    for backward in (forward, both):
        yield Row(f"decays-{_way(backward)}", partial(_decays, wide, backward))
    for case, shape in _ERRORS.items():
        yield Row(f"errors-{case}", partial(_errors, case, shape), rounds=3)
    yield _op("decode-step", "gdn-step", "B1 H16 K128 V256 L24", _F32, forward, None, rounds=15)
    yield _op("decode-step-rule", "delta-rule-step", "B1 H16 K128 V256 L24", _F32, forward, 3.0, rounds=15)
    yield _op("decode-step-mamba2", "mamba2-step", "B1 H32 P64 N128 L24", _F32, forward, None, rounds=15)
    for tokens in (2048, 8192):
        for backward in (forward, both):
            label = f"{tokens // 1024}k"
            yield _op(f"mamba2-scan-{label}", "mamba2-scan", f"T{tokens}", _F32, backward, 2.0, rounds=5)
            yield _op(f"mamba2-mixer-{label}", "mamba2-mixer", f"D1024 T{tokens}", _F32, backward, 2.0, rounds=5)
    goals = {(512, _F32, False): 6.0, (512, _F32, True): 5.0, (512, _BF16, False): 10.0, (512, _BF16, True): 10.0}
    for window in (512, 1024):
        for dtype in (_F32, _BF16):
            for backward in (forward, both):
                goal_or_none = goals.get((window, dtype, backward))
                shape = f"T8192 W{window}"
                yield _op(f"window-{window}", "window-attention", shape, dtype, backward, goal_or_none, rounds=5)
    for dtype, goal in ((_F32, 3.0), (_BF16, 2.5)):
        yield Row(f"train-{_short(dtype)}", partial(_train, dtype, goal), rounds=5)
        yield Row(f"train-mild-{_short(dtype)}", partial(_train, dtype, None, False), rounds=5)
    yield Row("decode", _decode, rounds=9)
    for case in GROWTH_SHAPES:
        yield Row(f"growth-{case}", partial(_growth, case), rounds=5)


def _op(
    label: str, case: str, shape: str, dtype: torch.dtype, backward: bool, goal: float | None, rounds: int = 7
) -> Row:
    def works() -> list[Work]:
        found = find_case(case)
        work = found.build(Request(parse_shape(shape, found.sizes), dtype=dtype, backward=backward))
        return [dataclasses.replace(work, goal=goal)]

    steps = not backward and case.endswith("-step")
    return Row(f"{label}-{_short(dtype)}" + ("" if steps else f"-{_way(backward)}"), works, rounds)


def _decays(shape: str, backward: bool) -> list[Work]:
    """Our own operator with mild decays and with decays from near 0 to -60 a step: the same work, in equal time."""
    case = find_case("gated-delta-rule")
    request = Request(parse_shape(shape, case.sizes), backward=backward, peers=())
    mild, strong = (case.build(dataclasses.replace(request, decay=decay)) for decay in ("mild", "strong"))
    other = dataclasses.replace(strong.sides[0], name="hybridvl, strong decays")
    return [dataclasses.replace(mild, name="gated-delta-rule decays", sides=(*mild.sides, other))]


def _errors(name: str, shape: str) -> Iterator[Work]:
    """Errors of both sides against float64, forward and backward, at a ragged length: in both dtypes, and for the
    recurrences also with decays from near 0 to -60 a step."""
    case = find_case(name)
    recurrent = name in ("gated-delta-rule", "mamba2-scan")
    for dtype in (_F32, _BF16):
        for decay in ("mild", "strong") if recurrent else ("mild",):
            request = Request(parse_shape(shape, case.sizes), dtype=dtype, backward=True, decay=decay)
            yield build(case, request, errors=True)


def _train(dtype: torch.dtype, goal: float | None, peer_decays: bool = True) -> list[Work]:
    """12.6 M parameters, the head not tied; with the decays that Qwen3-Next starts with, or ours."""
    config = model_config("(gdn*3 full)*2", width=256, mlp_width=768, vocab_size=8192)
    config = dataclasses.replace(config, tie_embeddings=False)
    request = ModelRequest(config, (QWEN3_NEXT,), dtype, batch=4, tokens=1024, peer_decays=peer_decays)
    return [dataclasses.replace(train_work(request), goal=goal)]


def _decode() -> Iterator[Work]:
    config = model_config("(swa gdn*3)*2", width=1024, mlp_width=2816, vocab_size=32768)
    return decode_works(ModelRequest(config, ("full*8", QWEN25)), (1024, 4096, 16384, 65536))


def _growth(name: str) -> Iterator[Work]:
    case = find_case(name)
    for tokens in _LENGTHS:
        sizes = parse_shape(f"{GROWTH_SHAPES[name]} T{tokens}", case.sizes)
        yield case.build(Request(sizes, peers=()))


def _short(dtype: torch.dtype) -> str:
    return {_F32: "float32", _BF16: "bf16"}[dtype]


def _way(backward: bool) -> str:
    return "both" if backward else "forward"


_SUITES: dict[str, Callable[[], Iterator[Row]]] = {"cpu": _cpu_rows}
