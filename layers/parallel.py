"""Several mixers side by side in one layer, as a pattern's "a+b" writes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from hybridvl.layers.base import Mixer, MixerConfig, Sequence, State
from hybridvl.layers.norms import RMSNorm
from hybridvl.layers.validate import check_types, expect, expect_positive


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(MixerConfig):
    """Mixers that read the same input; their outputs are averaged, each after an RMSNorm of its own.

    Attributes:
        branches: configurations of the mixers, two or more.
        norm_eps: epsilon of the norms.
    """

    branches: tuple[MixerConfig, ...]
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_types(self)
        listed = len(self.branches) > 1 and all(isinstance(branch, MixerConfig) for branch in self.branches)
        expect(self, "branches", listed, "two or more mixer configurations")
        expect_positive(self, "norm_eps")

    @property
    def rotary_dims(self) -> frozenset[int]:
        """The head dims of all branches."""
        return frozenset().union(*(branch.rotary_dims for branch in self.branches))

    def build(self, width: int) -> Parallel:
        """The module for model width D."""
        return Parallel(self, width)

    def num_params(self, width: int) -> int:
        """Exact number of parameters."""
        return sum(branch.num_params(width) + width for branch in self.branches)

    def flops(self, width: int, tokens: int, context: int = 0) -> int:
        """See `MixerConfig.flops`."""
        return sum(branch.flops(width, tokens, context) for branch in self.branches)

    def state_bytes(self, context: int, dtype: torch.dtype, width: int | None = None) -> int:
        """See `MixerConfig.state_bytes`."""
        return sum(branch.state_bytes(context, dtype, width) for branch in self.branches)


@dataclass
class ParallelState(State):
    """The states of the branches, named by their number."""

    branches: tuple[State, ...]

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Self:
        return replace(self, branches=tuple(branch._mapped(change) for branch in self.branches))

    def _children(self) -> list[tuple[str, Tensor | State]]:
        return [(str(index), branch) for index, branch in enumerate(self.branches)]


class Parallel(Mixer):
    """y = mean of rmsnorm(branch(x)) over the branches."""

    def __init__(self, config: ParallelConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.branches = nn.ModuleList(branch.build(width) for branch in config.branches)
        self.norms = nn.ModuleList(RMSNorm(width, config.norm_eps) for _ in config.branches)

    def forward(self, x: Tensor, sequence: Sequence, state: State | None = None) -> Tensor:
        """See `Mixer.forward`."""
        assert state is None or isinstance(state, ParallelState)
        states = [None] * len(self.branches) if state is None else state.branches
        outputs = [
            norm(branch(x, sequence, own)) for branch, norm, own in zip(self.branches, self.norms, states, strict=True)
        ]
        return torch.stack(outputs).mean(dim=0)

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ParallelState:
        """See `Mixer.init_state`."""
        return ParallelState(tuple(branch.init_state(batch, device, dtype) for branch in self.branches))  # type: ignore[operator]
