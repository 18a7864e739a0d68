"""Statistics, interleaving with a mocked clock, memory, shapes: the arithmetic under the measurements."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridvl.bench.machine import describe, measure_limits
from hybridvl.bench.memory import peak_memory
from hybridvl.bench.shapes import parse_lengths, parse_shape
from hybridvl.bench.sides import Results, Side, relative_difference, result_bytes
from hybridvl.bench.stats import growth, ratio, spread
from hybridvl.bench.timing import interleave, timer
from hybridvl.layers import ConfigError

positive = st.floats(1e-6, 1e6)


@given(st.lists(positive, min_size=1, max_size=40))
def test_spread_holds_the_median(values: list[float]) -> None:
    found = spread(values)
    assert found.median == pytest.approx(statistics.median(values))
    assert min(values) <= found.low <= found.median <= found.high <= max(values)


@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=40))
def test_a_ratio_is_that_of_the_rounds(pairs: list[tuple[float, float]]) -> None:
    over, under = zip(*pairs, strict=True)
    found = ratio(over, under)
    rounds = [a / b for a, b in pairs]
    assert found.median == pytest.approx(statistics.median(rounds))
    assert min(rounds) <= found.low <= found.median <= found.high <= max(rounds)
    assert found.level <= 1


@pytest.mark.parametrize(
    ("count", "rank", "level"), [(1, 0, 0.0), (5, 0, 0.9375), (6, 0, 0.96875), (9, 1, 0.9609375), (20, 5, 0.9586105)]
)
def test_the_interval_of_the_median(count: int, rank: int, level: float) -> None:
    """Ranks and coverages as in tables of the sign test."""
    found = ratio([float(i) for i in range(1, count + 1)], [1.0] * count)
    assert (found.low, found.high) == (rank + 1, count - rank)
    assert found.level == pytest.approx(level)


@given(st.floats(0, 10), st.floats(1e-3, 10), st.lists(st.integers(1, 1 << 16), min_size=2, max_size=8, unique=True))
def test_growth_finds_a_line(fixed: float, slope: float, lengths: list[int]) -> None:
    found = growth(lengths, [fixed + slope * length for length in lengths])
    assert found.per_unit == pytest.approx(slope, rel=1e-3)
    assert found.deviation < 1e-4


def test_growth_of_a_square_is_not_linear() -> None:
    lengths = [1024 << i for i in range(7)]
    found = growth(lengths, [1e-9 * length**2 for length in lengths])
    assert found.exponent == pytest.approx(2)
    assert found.deviation > 0.5


def test_the_sides_take_turns_and_short_work_is_repeated() -> None:
    calls: list[str] = []
    clock = {"fast": 1e-4, "slow": 0.5}

    def measure(run: Callable[[], Results], repeats: int) -> float:
        for _ in range(repeats):
            run()
        name = calls[-1]
        return clock[name]

    def work(name: str) -> Callable[[], Results]:
        return lambda: calls.append(name) or {}  # type: ignore[func-returns-value]

    sides = [Side(name, work(name)) for name in clock]
    found = interleave(sides, rounds=3, warmup=2, measure=measure)
    assert found == {"fast": [1e-4] * 3, "slow": [0.5] * 3}
    fast, slow = ["fast"] * 20, ["slow"]  # 2 ms at least
    assert calls == ["fast"] * 2 + ["slow"] * 2 + fast + slow + slow + fast + fast + slow


def test_what_comes_before_a_run_is_done_every_time_and_not_timed() -> None:
    done: list[str] = []

    def measure(run: Callable[[], Results], repeats: int) -> float:
        done.extend([f"clock {repeats}"])
        run()
        return 1e-3

    side = Side("side", lambda: done.append("run") or {}, before=lambda: done.append("before"))  # type: ignore[func-returns-value]
    found = interleave([side], rounds=2, warmup=1, measure=measure)
    assert found == {"side": [1e-3] * 2}
    assert done == ["before", "clock 1", "run"] * (1 + 2 * 2)  # 2 ms at least


def test_the_wall_clock_measures_each_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 2.0, 10.0, 14.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    assert timer("cpu")(dict, 2) == 3.0


def test_peak_memory_sees_scratch_and_results() -> None:
    size = 64 << 20

    def run() -> Results:
        kept = torch.ones(size // 4)
        scratch = torch.ones(2 * size // 4)
        return {"kept": kept, "sum": scratch.sum()}

    found = peak_memory(run, "cpu")
    if found is None:
        pytest.skip("the system does not tell the peak of the resident set")
    # The kernel counts pages in batches, so a few may be missing.
    assert 2.9 * size < found.peak < 3.2 * size
    assert 1.9 * size < found.scratch < 2.2 * size
    again = peak_memory(run, "cpu")
    assert again is not None
    assert again.peak == pytest.approx(found.peak, rel=0.05)  # memory that was freed counts again
    small = peak_memory(lambda: {"x": torch.ones(1)}, "cpu")
    assert small is not None
    assert small.peak < size / 8  # not what the process once needed


def test_shared_memory_counts_once() -> None:
    x = torch.zeros(10)
    assert result_bytes({"x": x, "view": x[:5], "other": torch.zeros(3)}) == 52


def test_relative_differences() -> None:
    x = torch.tensor([3.0, 4.0])
    assert relative_difference(x, x) == 0
    assert relative_difference(x + torch.tensor([0.0, 0.5]), x) == pytest.approx(0.1)
    assert relative_difference(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_difference(x, torch.zeros(2)) == float("inf")
    assert relative_difference(x.clone().fill_(float("nan")), x) != relative_difference(x, x)


def test_limits_come_from_the_clock() -> None:
    def measure(run: Callable[[], Results], repeats: int) -> float:
        run()
        return 0.5

    found = measure_limits(torch.float32, "cpu", measure, repeats=1)
    assert found.matmul_flops == 2 * 1024**3 / 0.5
    assert found.copy_bytes == found.inplace_bytes == found.bytes == 2 * (256 << 20) / 0.5


def test_the_description_says_what_was_used() -> None:
    found = describe("cpu")
    assert found["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert found["threads"] == torch.get_num_threads()


def test_shapes() -> None:
    defaults = {"B": 1, "T": 2048, "Hkv": 2}
    assert parse_shape("T8192 Hkv4", defaults) == {"B": 1, "T": 8192, "Hkv": 4}
    assert parse_shape("B16,T4K", defaults) == {"B": 16, "T": 4096, "Hkv": 2}
    assert parse_shape("", defaults) == defaults
    for text, message in (
        ("T", "'T': expected a letter and a size"),
        ("Q3", "unknown letter 'Q'; expected B, T, Hkv"),
        ("T0", "'T0': expected a size of at least 1"),
        ("T=3", "'T=3': expected a letter"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_shape(text, defaults)


def test_lengths() -> None:
    assert parse_lengths(["4K", "1024", "1k", "1M"], "--lengths") == [1024, 4096, 1 << 20]
    assert parse_lengths(["1K", "0"], "--contexts", least=0) == [0, 1024]
    for text in ("0", "-1", "x", "1.5K", ""):
        with pytest.raises(ConfigError, match="--lengths"):
            parse_lengths([text], "--lengths")
