"""What a case of an operator or a mixer is, and what is asked of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hybridvl.bench.sides import Work
from hybridvl.layers.errors import ConfigError

FORWARD, BOTH = "forward", "forward + backward"
DIRECTIONS = (FORWARD, BOTH)


@dataclass(frozen=True)
class Request:
    """What is asked of a case.

    Attributes:
        sizes: by letter, complete.
        dtype, device: of the tensors.
        backward: whether gradients are computed too.
        peers: names of peers, or None for those of the device; empty for ours alone.
        backend: of our side.
        decay: "mild" decays as in training, or "strong": from near 0 to -60 a step.
        rounded: dtype that inputs are rounded to before they get `dtype`, so that a float64 reference has the same.
        cotangents: what the backward pass starts from, by output; filled by the first side that runs.
    """

    sizes: Mapping[str, int]
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    backward: bool = False
    peers: tuple[str, ...] | None = None
    backend: str = "auto"
    decay: str = "mild"
    rounded: torch.dtype | None = None
    cotangents: dict[str, Tensor] = field(default_factory=dict)

    @property
    def direction(self) -> str:
        """In words."""
        return BOTH if self.backward else FORWARD

    def cast(self, tensor: Tensor) -> Tensor:
        """A tensor in the dtype asked for."""
        return tensor.to(self.rounded or self.dtype).to(self.dtype)

    @property
    def dtype_name(self) -> str:
        """Without "torch."."""
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Case:
    """A kind of work.

    Attributes:
        name, about: for the command line.
        sizes: letters and default sizes.
        build: makes the work.
        length: the letter of the sequence length; "" where there is none.
        differentiable: whether it has a backward pass.
        has_reference: whether our side computes in float64 with the backend "reference" (`with_reference`).
        peers: by kind of device, the names of its peers.
    """

    name: str
    about: str
    sizes: Mapping[str, int]
    build: Callable[[Request], Work]
    peers: Mapping[str, tuple[str, ...]]
    length: str = "T"
    differentiable: bool = True
    has_reference: bool = False

    def chosen_peers(self, request: Request) -> tuple[str, ...]:
        """The names asked for, checked, or those of the device."""
        known = self.peers.get(torch.device(request.device).type, ())
        if request.peers is None:
            return known
        for name in request.peers:
            if name not in known:
                listed = ", ".join(known) or "none"
                raise ConfigError(f"--peer {name!r}: {self.name} has no such peer on {request.device}; known: {listed}")
        return request.peers
