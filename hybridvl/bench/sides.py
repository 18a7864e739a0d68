"""What is measured: sides that do the same work, and the check that they do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Results = dict[str, Tensor]


class UnequalWorkError(Exception):
    """Two sides of a comparison do not compute the same thing, so their times may not be compared."""


@dataclass(frozen=True)
class Side:
    """One implementation.

    Attributes:
        name: as tables show it.
        run: the timed work; returns its results by name.
        check: results that are compared where the timed work's own are not meant for it (a training step's).
        same_as: name of the side whose results it must have; None for other work (another model), which is timed
            beside it but not compared.
        before: brings back what a run changes and the next one must find; called before every run, not timed.
        weight_bytes, state_bytes: held all the time, where the work is that of a model: its parameters, and its state
            before a run (after it, where it begins with none).
    """

    name: str
    run: Callable[[], Results]
    check: Callable[[], Results] | None = None
    same_as: str | None = None
    before: Callable[[], None] | None = None
    weight_bytes: int | None = None
    state_bytes: int | None = None

    def begin(self) -> None:
        """What comes before a run."""
        if self.before is not None:
            self.before()


@dataclass(frozen=True)
class Work:
    """Sides that take turns.

    Attributes:
        name: of the case.
        sizes: what tells this measurement from others of the same case.
        dtype, device: of the tensors. direction: a key of `hybridvl.bench.included.INCLUDED`.
        sides: ours first.
        flops: of the work by the usual count: recomputation is not counted; None where sides differ.
        nbytes: what must at least be read and written.
        tokens, frames: of one run, for how many there are in a second and how long one takes.
        tolerance: of compared results, relative in the Euclidean norm.
        reference: the results in float64, that every side's errors are measured from.
        goal: least ratio peer / ours that is aimed at.
        goal_peer: name of the side the goal is about; None: the second.
    """

    name: str
    sizes: Mapping[str, int | float | str]
    dtype: str
    direction: str
    device: str
    sides: tuple[Side, ...]
    flops: float | None = None
    nbytes: float | None = None
    tokens: int | None = None
    frames: int | None = None
    tolerance: float = 1e-4
    goal: float | None = None
    goal_peer: str | None = None
    reference: Callable[[], Results] | None = None

    @property
    def title(self) -> str:
        """Name and sizes on a line."""
        sizes = " ".join(f"{key}{value}" for key, value in self.sizes.items())
        return f"{self.name} {sizes}, {self.dtype}, {self.direction}"


TOLERANCES = {"float64": 1e-9, "float32": 2e-4, "bfloat16": 4e-2, "float16": 1e-2}
"""By dtype: far above rounding, far below any difference in what is computed."""


def compare(work: Work) -> dict[str, dict[str, float]]:
    """Relative differences of every compared side, by side and result.

    Raises UnequalWorkError when a side lacks a result, has another shape, or differs by more than the tolerance.
    """
    wanted = {side.same_as for side in work.sides if side.same_as is not None}
    kept: dict[str, Results] = {}
    differences: dict[str, dict[str, float]] = {}
    for side in work.sides:
        if side.same_as is None and side.name not in wanted:
            continue
        side.begin()
        found = (side.check or side.run)()
        if side.name in wanted:
            kept[side.name] = {name: value.detach().clone() for name, value in found.items()}
        if side.same_as is not None:
            differences[side.name] = _differences(work, side, found, kept[side.same_as])
    return differences


def errors(work: Work) -> dict[str, dict[str, float]]:
    """Relative errors of every side's results from the reference, by side and result; nothing without a reference."""
    if work.reference is None:
        return {}
    # The first side fills the cotangents that the reference shares.
    found = {side.name: side.run() for side in work.sides}
    exact = work.reference()
    return {
        side: {name: relative_difference(value, exact[name]) for name, value in results.items()}
        for side, results in found.items()
    }


def tensor_side(
    name: str,
    call: Callable[[], Results],
    leaves: Mapping[str, Tensor],
    cotangents: dict[str, Tensor] | None,
    same_as: str | None = None,
) -> Side:
    """A side of pure functions: outputs, and with `cotangents` (shared by the sides, filled on first use) gradients."""

    def forward() -> Results:
        with torch.no_grad():
            return call()

    def both() -> Results:
        assert cotangents is not None
        outputs = call()
        for key, value in outputs.items():
            if key not in cotangents:
                generator = torch.Generator().manual_seed(len(key))
                noise = torch.randn(value.shape, generator=generator)
                cotangents[key] = noise.to(value.device, value.dtype)
        given = [cotangents[key].to(value.dtype) for key, value in outputs.items()]
        gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), given)
        found = {key: value.detach() for key, value in outputs.items()}
        return found | {f"gradient of {key}": value for key, value in zip(leaves, gradients, strict=True)}

    return Side(name, forward if cotangents is None else both, same_as=same_as)


def result_bytes(results: Mapping[str, Tensor]) -> int:
    """Bytes of the results' memory, shared memory once."""
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in results.values()}
    return sum(storages.values())


def _differences(work: Work, side: Side, found: Results, expected: Results) -> dict[str, float]:
    if found.keys() != expected.keys():
        raise UnequalWorkError(
            f"{work.title}: {side.name} gives {', '.join(found)}, {side.same_as} gives {', '.join(expected)}"
        )
    differences = {}
    for name, value in found.items():
        if value.shape != expected[name].shape:
            raise UnequalWorkError(
                f"{work.title}: {name} of {side.name} has shape {tuple(value.shape)}, that of {side.same_as} "
                f"{tuple(expected[name].shape)}"
            )
        differences[name] = relative_difference(value, expected[name])
        if not differences[name] <= work.tolerance:  # also NaN
            raise UnequalWorkError(
                f"{work.title}: {name} of {side.name} differs from that of {side.same_as} by "
                f"{differences[name]:.2e} of its norm, more than {work.tolerance:.0e}"
            )
    return differences


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Euclidean norm of the difference over that of `expected`, in float64; infinite where only `expected` is 0."""
    wide = expected.detach().double()
    distance, size = float((found.detach().double() - wide).norm()), float(wide.norm())
    if size == 0:
        return 0.0 if distance == 0 else math.inf
    return distance / size
