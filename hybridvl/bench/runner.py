"""From work to numbers: compare, time in turns, measure memory, and set against the machine's limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hybridvl.bench.machine import Limits
from hybridvl.bench.memory import Peak, peak_memory
from hybridvl.bench.sides import Side, Work, compare, errors
from hybridvl.bench.stats import Ratio, Spread, ratio, spread
from hybridvl.bench.timing import Timer, interleave, timer

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        rounds: timed turns of every side. warmup: runs of every side before them.
        memory: whether to measure peak memory, in one more run of every side.
        measure: seconds of a piece of work; None: the device's own.
    """

    rounds: int = 7
    warmup: int = 1
    memory: bool = True
    measure: Timer | None = None


@dataclass(frozen=True)
class Measured:
    """One side: seconds of every round, memory of one run (None: not measured), and what it holds, see `Side`."""

    name: str
    seconds: tuple[float, ...]
    peak: Peak | None
    weight_bytes: int | None
    state_bytes: int | None

    @property
    def spread(self) -> Spread:
        """Median and quartiles of the seconds."""
        return spread(self.seconds)


@dataclass(frozen=True)
class Measurement:
    """What was measured of some work.

    Attributes:
        sides: ours first.
        ratios: of every other side's time over ours, by its name.
        differences: of compared results, by side and result, relative in the Euclidean norm.
        errors: of all results from a float64 reference, where the work has one.
    """

    work: Work
    sides: tuple[Measured, ...]
    ratios: dict[str, Ratio]
    differences: dict[str, dict[str, float]]
    errors: dict[str, dict[str, float]]
    limits: Limits | None

    @property
    def goal_met(self) -> bool | None:
        """Whether the median ratio reaches the goal; None without a goal."""
        if self.work.goal is None or not self.ratios:
            return None
        return self.ratios[self.goal_peer].median >= self.work.goal

    @property
    def goal_peer(self) -> str:
        """The side that the goal is about; "" where ours was alone."""
        return self.work.goal_peer or next(iter(self.ratios), "")

    def rates(self, side: Measured) -> dict[str, float]:
        """Of a side at its median: tokens/s and frames/s, milliseconds of each, FLOP/s and bytes/s with their shares of
        the limits.

        FLOPs and bytes are those of our work: sides that do other work have none.
        """
        seconds, work = side.spread.median, self.work
        ours = work.sides[0].name
        found = {}
        for unit, count in (("token", work.tokens), ("frame", work.frames)):
            if count:
                found[f"{unit}s_per_second"] = count / seconds
                found[f"ms_per_{unit}"] = 1e3 * seconds / count
        if side.name != ours and all(other.same_as != ours for other in work.sides if other.name == side.name):
            return found
        for name, amount, limit in (
            ("flops", work.flops, self.limits and self.limits.matmul_flops),
            ("bytes", work.nbytes, self.limits and self.limits.bytes),
        ):
            if amount:
                found[f"{name}_per_second"] = amount / seconds
                if limit:
                    found[f"{name}_share_of_limit"] = amount / seconds / limit
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; times in seconds."""
        work = self.work
        return {
            "case": work.name,
            "title": work.title,
            "sizes": {key.strip(): value for key, value in work.sizes.items()},
            "dtype": work.dtype,
            "direction": work.direction,
            "device": work.device,
            "flops": work.flops,
            "bytes": work.nbytes,
            "tokens": work.tokens,
            "frames": work.frames,
            "sides": [self._side_dict(side) for side in self.sides],
            "ratios": {name: vars(found) for name, found in self.ratios.items()},
            "differences": self.differences,
            "errors": self.errors,
            "goal": work.goal,
            "goal_peer": self.goal_peer,
            "goal_met": self.goal_met,
            "limits": None if self.limits is None else vars(self.limits),
        }

    def _side_dict(self, side: Measured) -> dict[str, Any]:
        middle = side.spread
        return {
            "name": side.name,
            "median": middle.median,
            "quartile_low": middle.low,
            "quartile_high": middle.high,
            "seconds": list(side.seconds),
            "peak_bytes": side.peak and side.peak.peak,
            "scratch_bytes": side.peak and side.peak.scratch,
            "weight_bytes": side.weight_bytes,
            "state_bytes": side.state_bytes,
            **self.rates(side),
        }


def measure(
    work: Work, settings: Settings, limits: Limits | None = None, progress: Progress | None = None
) -> Measurement:
    """Compare the sides, then time them in turns; raises UnequalWorkError before anything is timed."""
    say = progress or (lambda text: None)
    say(f"{work.title}: comparing")
    differences, wrong = compare(work), errors(work)
    seconds = interleave(
        work.sides,
        settings.rounds,
        settings.warmup,
        settings.measure or timer(work.device),
        lambda text: say(f"{work.title}: {text}"),
    )
    sides = tuple(_measured(side, seconds[side.name], work.device, settings.memory) for side in work.sides)
    first, *others = sides
    ratios = {other.name: ratio(other.seconds, first.seconds) for other in others}
    return Measurement(work, sides, ratios, differences, wrong, limits)


def _measured(side: Side, seconds: Sequence[float], device: str, memory: bool) -> Measured:
    side.begin()
    peak = peak_memory(side.run, device) if memory else None
    return Measured(side.name, tuple(seconds), peak, side.weight_bytes, side.state_bytes)
